"""A continued run uses the record of how it began, not the defaults of the machine on which it continues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import flags, run_script

from common.errors import UserError
from common.runs.checkpoints import complete_checkpoints
from common.runs.files import write_json
from common.runs.record import TRAINING_CONFIG, stored_settings
from common.settings.fields import absolute
from common.settings.grpo import PACKAGED_MODEL, TrainingArgs


def stored(folder: Path, given: dict[str, object], **facts: object) -> object:
    settings = {"output_dir": "x", "use_4bit": None}
    write_json(folder / TRAINING_CONFIG, {"script": "s.py", "settings": settings, **facts})
    return stored_settings(folder, given, set(), "s.py")["use_4bit"]


def test_4bit_is_as_the_run_was_started_where_it_was_left_to_the_machine(tmp_path):
    assert stored(tmp_path, {}, four_bit=True) is True
    assert stored(tmp_path, {}, four_bit=False) is False
    assert stored(tmp_path, {"use_4bit": True}, four_bit=True) is True, "the same, said once more"
    assert stored(tmp_path, {}) is None, "of an earlier version, which did not record it"
    with pytest.raises(UserError, match="--4bit False differs from the run"):
        stored(tmp_path, {"use_4bit": False}, four_bit=True)


@pytest.mark.parametrize(
    ("script", "settings", "flags", "told"),
    [
        ("grpo_training.py", {"lr": "fast"}, ["--resume"], "{file}: --lr must be float, found 'fast'"),
        ("grpo_training.py", {"top_p": 2}, ["--eval-only", "--eval-samples", "9"], "{file}: --top-p must lie between"),
        ("grpo_training.py", {"grad_accum": 3}, ["--resume", "--check"], "{file}: --batch-size 1 × --grad-accum 3"),
        ("grpo_training.py", {"max_steps": 0}, ["--resume", "--max-steps", "-1"], "--max-steps must be greater than 0"),
        ("dummy_planner.py", {"seed": None}, ["--resume"], "{file}: --seed must be int, found None"),
    ],
)
def test_a_wrong_value_in_the_record_is_told_with_the_file(tmp_path, script, settings, flags, told):
    file = tmp_path / TRAINING_CONFIG
    write_json(file, {"script": script, "settings": {"output_dir": "x", **settings}})
    done = run_script(script, "--output-dir", str(tmp_path), *flags)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"{script}: error: {told.format(file=file)}"), line


def test_a_record_names_files_and_folders_so_that_a_resume_from_elsewhere_finds_them(tmp_path, monkeypatch):
    from common import models
    from common.training.records import start_records

    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here / "warm", here / "base", here / "a+b", elsewhere):
        folder.mkdir(parents=True)
    (here / "train.jsonl").write_text("")
    monkeypatch.chdir(here)
    args = TrainingArgs(
        base_model="base", adapter_path="warm", dataset="multi:./train.jsonl?parts=2", eval_dataset="a+b",
        output_dir="run", vllm_adapter_dir="versions", vllm_python="../python",
    )  # fmt: skip
    (here / "run").mkdir()
    start_records(args, None, script="grpo_training.py")
    stored = json.loads((here / "run" / TRAINING_CONFIG).read_text())["settings"]
    assert stored == args.to_dict() | {
        "base_model": f"{here}/base", "adapter_path": f"{here}/warm", "dataset": f"multi:{here}/train.jsonl?parts=2",
        "eval_dataset": f"{here}/a+b", "output_dir": f"{here}/run", "vllm_adapter_dir": f"{here}/versions",
        "vllm_python": f"{here}/../python",
    }  # fmt: skip
    assert models.resolve_model("base") == stored["base_model"], "adapter_config.json holds this name"
    monkeypatch.chdir(elsewhere)
    same = {"adapter_path": "../here/warm", "dataset": "multi:../here/train.jsonl?parts=2"}
    assert stored_settings(here / "run", same, set(), "grpo_training.py")["base_model"] == f"{here}/base"
    for other in ({"adapter_path": "warm"}, {"base_model": "base"}, {"dataset": "multi:../here/train.jsonl?parts=3"}):
        with pytest.raises(UserError, match="differs from the run"):
            stored_settings(here / "run", other, set(), "grpo_training.py")


def test_names_that_are_no_paths_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packaged" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    odd = ("", "multi:?", "x" * 999, "~\0", "~nobody-here/x", "\ud800")
    for name in ("meta-llama/Llama-3.1-8B-Instruct", PACKAGED_MODEL, "generated:shares?people=3", *odd):
        assert absolute(name) == name


def test_the_scoreboard_alone_is_kept_in_the_precision_of_the_run(tiny_args, tmp_path):
    tiny_args.dataset, tiny_args.max_samples, tiny_args.max_steps = "generated:shares?people=3", 20, 1
    given = [flag for flag in flags(tiny_args) if flag != "--no-4bit"]
    done = run_script("grpo_training.py", *given)
    assert done.returncode == 0, done.stderr
    folder = Path(tiny_args.output_dir)
    record = json.loads((folder / TRAINING_CONFIG).read_text())
    assert record["four_bit"] is False and record["dtype"] == "torch.float32"
    assert record["settings"]["use_4bit"] is None
    seen = {}
    on_a_gpu = {"settings": {**record["settings"], "cpu_dtype": "auto"}}  # a run on a GPU does not use --cpu-dtype
    for change in ({}, {"dtype": "torch.bfloat16"}, {"four_bit": True, **on_a_gpu}):
        write_json(folder / TRAINING_CONFIG, {**record, **change})
        done = run_script("grpo_training.py", "--output-dir", str(folder), "--eval-only", "--eval-samples", "2")
        assert done.returncode == 0, done.stderr
        if change:
            assert "direct: the earlier row is not used again, it was made with other worker" in done.stderr
            assert "untrained planner: the earlier row is not used again, it was made with other worker, base" in (
                done.stderr
            )
        line = json.loads((folder / "evaluation.jsonl").read_text().splitlines()[0])
        seen[json.dumps(change)] = line["fingerprint"]["worker"]
    assert len(set(seen.values())) == 3


def test_a_checkpoint_lacks_something_until_every_process_has_written_its_random_numbers(finished_run, tmp_path):
    """The first process writes the last file of a checkpoint without waiting for the other processes."""
    _, finished, _ = finished_run
    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    assert len(complete_checkpoints(tmp_path)) == 1
    write_json(tmp_path / TRAINING_CONFIG, {"processes": 2})
    assert complete_checkpoints(tmp_path) == []
    for rank in range(2):
        one = finished / "checkpoint-2" / "rng_state.pth"
        shutil.copy(one, tmp_path / "checkpoint-2" / f"rng_state_{rank}.pth")
    (tmp_path / "checkpoint-2" / "rng_state.pth").unlink()
    assert len(complete_checkpoints(tmp_path)) == 1
