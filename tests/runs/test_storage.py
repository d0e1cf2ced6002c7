"""A disk that is really full: a file system of a few megabytes, and runs that continue once there is room."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import flags, run_script
from safetensors.torch import save_file

from common.errors import UserError
from common.reports.jsonl import append_jsonl, read_jsonl
from common.runs import storage
from common.runs.checkpoints import complete_checkpoints
from common.runs.files import write_json


@pytest.fixture
def small_disk(tmp_path):
    """(mount point of an empty file system of 6 MB, a function that makes it larger by a number of MB)."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def grow(megabytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", str(place)], check=True)

    yield place, grow
    # A lazy unmount, because an error that a test has caught may still keep its file open.
    subprocess.run(["umount", "-l", str(place)], check=True)


def told(folder: Path, work: Callable[[], object]) -> str:
    """The one line that explains a failed write."""
    with pytest.raises(UserError) as caught, storage.explained(folder, lambda: "then again", lambda: 20_000_000):
        work()
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    return str(caught.value)


def test_every_way_of_writing_names_its_file_and_what_is_missing(small_disk):
    folder, _ = small_disk
    zeros = {"a": torch.zeros(3_000_000)}
    unfinished = folder / "checkpoint-3"
    unfinished.mkdir()
    ways: dict[Path, Callable[[], object]] = {
        folder / "samples.jsonl": lambda: append_jsonl(folder / "samples.jsonl", {"text": "x" * 7_000_000}),
        folder / "evaluation.json": lambda: write_json(folder / "evaluation.json", "x" * 7_000_000),
        unfinished / "adapter_model.safetensors": lambda: save_file(zeros, unfinished / "adapter_model.safetensors"),
        unfinished / "optimizer.pt": lambda: torch.save(zeros, unfinished / "optimizer.pt"),
        unfinished / "trainer_state.json": lambda: (unfinished / "trainer_state.json").write_text("x" * 7_000_000),
    }
    for path, way in ways.items():
        line = told(folder, way)
        assert line.startswith(f"{path} could not be written: no space left on device ("), line
        assert " MB free, about " in line and "missing; a checkpoint takes 20.0 MB): then again" in line
        path.unlink(missing_ok=True)


def test_other_errors_pass_and_a_disk_that_fails_is_told_without_a_size(tmp_path):
    with pytest.raises(ValueError, match="no disk"), storage.explained(tmp_path, lambda: "then again"):
        raise ValueError("no disk")
    with pytest.raises(FileNotFoundError), storage.explained(tmp_path, lambda: "then again"):
        (tmp_path / "none").read_text()

    def fails() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "metrics.jsonl")

    assert told(tmp_path, fails) == "metrics.jsonl could not be written: read-only file system: then again"


def test_a_run_on_a_full_disk_says_so_and_goes_on_from_its_last_whole_checkpoint(small_disk, tiny_args):
    disk, grow = small_disk
    folder = disk / "run"
    tiny_args.output_dir, tiny_args.max_steps, tiny_args.save_steps = str(folder), 4, 1
    done = run_script("grpo_training.py", *flags(tiny_args))
    assert done.returncode == 1, done.stderr
    (whole,) = complete_checkpoints(folder)
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"grpo_training.py: error: {folder}/checkpoint-2/"), done.stderr
    assert "could not be written: no space left on device" in line and "missing; a checkpoint takes" in line
    assert "go on after step 1 with " in line and line.endswith(f"--output-dir {folder} --resume")
    assert "Traceback" not in done.stderr and whole.name == "checkpoint-1"
    grow(40)
    done = run_script("grpo_training.py", "--output-dir", str(folder), "--resume")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_disk_that_is_full_from_the_start_has_nothing_to_resume(small_disk, tiny_planner):
    disk, _ = small_disk
    (disk / "other").write_bytes(b"0" * 6_000_000)
    done = run_script(
        "dummy_planner.py", "--base-model", tiny_planner, "--output-dir", str(disk / "run"), "--no-wandb",
        "--format", "json-plan", "--dataset", "generated:shares", "--max-samples", "9", "--max-seq-len", "200",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "could not be written: no space left on device" in line and "there is no checkpoint yet" in line
