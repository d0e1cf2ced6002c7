"""`--overwrite` keeps the older run until the new one has its first checkpoint, even if one of them is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, flags, run_script

from common.reports.jsonl import read_jsonl
from common.runs.files import remove_unfinished
from common.runs.folder import REPLACED, drop_replaced, own_output_dir, put_back, set_aside
from common.runs.record import TRAINING_CONFIG

RUN = [
    TRAINING_CONFIG, "metrics.jsonl", "samples.jsonl", "evaluation.jsonl", "evaluation.json", "evaluation.png",
    "wandb_run.json", "adapter_model.safetensors", "training_curves.png", "checkpoint-3/optimizer.pt",
]  # fmt: skip


class KilledError(Exception):
    """Simulates the end of the process at that moment."""


def older_run(folder: Path) -> dict[str, str]:
    for name in [*RUN, "notes.txt"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"older {name}")
    return content(folder)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_sets_aside_all_that_an_older_one_has_written_and_nothing_else(tmp_path):
    before = older_run(tmp_path)
    set_aside(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", REPLACED}
    assert content(tmp_path / REPLACED) == {name: text for name, text in before.items() if name != "notes.txt"}
    drop_replaced(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    set_aside(tmp_path)  # there is no run to set aside
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("new_run", [False, True])
def test_killed_between_any_two_moves_the_older_run_is_found_again(tmp_path, monkeypatch, new_run):
    """Each move is one rename. The kill comes before the first, the second, … rename of a move aside or back."""
    rename = Path.rename
    left = [0]

    def failing(path: Path, target: Path) -> Path:
        if left[0] == 0:
            raise KilledError
        left[0] -= 1
        return rename(path, target)

    moments = 0
    while True:
        folder = tmp_path / str(moments)
        before = older_run(folder)
        if new_run:  # here the kill interrupts putting back
            set_aside(folder)
            (folder / "metrics.jsonl").write_text("new")
            (folder / "checkpoint-1").mkdir()  # an incomplete checkpoint
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", failing)
            left[0] = moments
            try:
                put_back(folder) if new_run else set_aside(folder)
            except KilledError:
                killed = True
            else:
                killed = False
        put_back(folder)
        assert content(folder) == before and not any(path.name.startswith(".") for path in folder.iterdir())
        if not killed:
            break
        moments += 1
    assert moments > len(RUN)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_ended_before_training_is_in_nobodys_way_and_its_scoreboard_stays(tmp_path, overwrite):
    for name in (TRAINING_CONFIG, "evaluation.json", "evaluation.jsonl"):
        (tmp_path / name).write_text("of the stopped run")
    before = content(tmp_path)
    with own_output_dir(tmp_path, overwrite=overwrite, resume=False):
        set_aside(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("script", ["grpo_training.py", "dummy_planner.py"])
@pytest.mark.parametrize("inside", [".", "checkpoint-1", "../link"])
def test_a_run_does_not_replace_the_adapter_from_which_it_starts(tmp_path, script, inside):
    folder = tmp_path / "run"
    before = older_run(folder)
    (tmp_path / "link").symlink_to(folder)
    done = run_script(
        script, "--demo", "--output-dir", str(folder), "--overwrite", "--adapter-path", str(folder / inside)
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "lies in --output-dir" in line and "name another --output-dir" in line
    assert content(folder) == before


@pytest.mark.parametrize("script", ["grpo_training.py", "dummy_planner.py"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_of_somebody_elses_files_is_refused_and_left_as_it_is(tmp_path, script, more):
    (tmp_path / "checkpoint-9").mkdir()  # of another program: it would be removed as a part of an older run
    for name in ("adapter_model.safetensors", "notes.md", ".run.lock"):
        (tmp_path / name).write_text("mine")
    done = run_script(script, "--demo", "--output-dir", str(tmp_path), *more)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "notes.md" in line and f"new or an empty folder, such as {tmp_path / 'run'}" in line
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".run.lock") == [
        "adapter_model.safetensors", "checkpoint-9", "notes.md",
    ]  # fmt: skip


def test_a_folder_with_logs_only_or_of_a_run_killed_before_its_first_checkpoint_is_taken(tmp_path):
    for name in ("train.log", "slurm-17.out", ".gitkeep", "vllm.log"):
        (tmp_path / name).write_text("")
    with own_output_dir(tmp_path, overwrite=False, resume=False):
        pass
    for name in (TRAINING_CONFIG, "metrics.jsonl", "notes.md"):
        (tmp_path / name).write_text("{}")
    with own_output_dir(tmp_path, overwrite=True, resume=False):
        pass
    (tmp_path / TRAINING_CONFIG).rename(tmp_path / "x")  # a kill in the middle of setting the run aside
    (tmp_path / ".replacing-run").mkdir()
    (tmp_path / "x").rename(tmp_path / ".replacing-run" / TRAINING_CONFIG)
    with own_output_dir(tmp_path, overwrite=True, resume=False):
        assert (tmp_path / TRAINING_CONFIG).is_file()


def test_an_error_before_the_first_checkpoint_puts_the_older_run_back(tmp_path, capsys):
    before = older_run(tmp_path)
    with pytest.raises(KilledError), own_output_dir(tmp_path, overwrite=True, resume=False):
        set_aside(tmp_path)
        (tmp_path / "samples.jsonl").write_text("new")
        raise KilledError
    assert content(tmp_path) == before
    assert f"the run in {tmp_path} is as it was" in capsys.readouterr().err


def test_a_kill_while_the_older_run_is_removed_leaves_nothing_that_looks_like_one(tmp_path, monkeypatch):
    older_run(tmp_path)
    set_aside(tmp_path)

    def killed(path: Path) -> None:
        (path / "metrics.jsonl").unlink()
        raise KilledError

    with monkeypatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(shutil, "rmtree", killed)
        drop_replaced(tmp_path)
    assert not (tmp_path / REPLACED).exists()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_is_killed_before_its_first_checkpoint_has_replaced_nothing(finished_run, tiny_args, tmp_path):
    _, finished, _ = finished_run
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    tiny_args.output_dir, tiny_args.max_steps, tiny_args.save_steps = str(folder), 500, 400
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "grpo_training.py"), *flags(tiny_args), "--overwrite"],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=dict(os.environ),
    )  # fmt: skip
    end = time.monotonic() + 180
    while not (folder / REPLACED).exists() or not (folder / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert (folder / REPLACED / "checkpoint-4").is_dir()
    done = run_script("grpo_training.py", "--output-dir", str(folder), "--resume", "--save-steps", "400")
    assert done.returncode == 0, done.stderr
    assert f"the run in {folder} is as it was" in done.stderr
    assert not (folder / REPLACED).exists() and len(read_jsonl(folder / "metrics.jsonl")) == 4
    for name in ("adapter_model.safetensors", "samples.jsonl"):
        assert (folder / name).read_bytes() == before[name]


def test_the_older_run_goes_with_the_first_checkpoint_of_the_new_one(finished_run, tiny_planner, tmp_path):
    _, finished, _ = finished_run
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    done = run_script(
        "dummy_planner.py", "--base-model", tiny_planner, "--output-dir", str(folder), "--no-wandb", "--overwrite",
        "--format", "json-plan", "--dataset", "generated:shares", "--max-samples", "9", "--batch-size", "8",
        "--planner-style", "short",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {path.name for path in folder.iterdir()}
    assert REPLACED not in names and "samples.jsonl" not in names and "checkpoint-4" not in names
    assert not any(name.startswith(".") for name in names)
