"""Several processes: two real ranks that communicate over gloo, started by torchrun or accelerate."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, run_script
from launched import ACCELERATE, ENVIRONMENT, LAUNCHER, RANKS, torchrun
from safetensors.torch import load_file

from common.reports.jsonl import read_jsonl
from common.runs.checkpoints import checkpoint_step, complete_checkpoints
from common.settings.grpo import TrainingArgs


@pytest.fixture(scope="module")
def two_ranks(tiny_planner, questions_file, tmp_path_factory) -> tuple[TrainingArgs, Path]:
    """A run on two ranks. A step uses all four questions, so every step is an epoch with its own order."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    args = TrainingArgs(
        base_model=tiny_planner, dataset=str(questions_file), output_dir=str(folder), planner_style="short",
        worker_style="few-shot", worker_max_tokens=8, max_completion_length=60, batch_size=4, grad_accum=2,
        num_generations=4, max_steps=4, temperature=1.0, lr=1e-3, lr_schedule="constant", save_steps=2, wandb=False,
        eval_samples=5, eval_dataset="generated:shares?people=3", cpu_dtype="float32",
    )  # fmt: skip
    done = torchrun(*flags(args))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "find_unused_parameters" not in done.stderr, "DDP searches for what this model has none of, in every pass"
    return args, folder


def test_two_ranks_train_one_adapter_and_resume_in_a_later_epoch_bit_for_bit(two_ranks, tmp_path):
    args, whole = two_ranks
    copy = tmp_path / "copy"
    samples = read_jsonl(whole / "samples.jsonl")
    per_step = args.batch_size * args.grad_accum * RANKS
    assert [row["step"] for row in samples] == [step for step in range(1, 5) for _ in range(per_step)]
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoint-4")
    alone = run_script("grpo_training.py", "--output-dir", str(copy), "--resume")
    assert alone.returncode == 2 and "has 2 processes, found 1" in alone.stderr
    done = torchrun("--output-dir", str(copy), "--resume", launcher=ACCELERATE)
    assert done.returncode == 0, done.stderr[-3000:]
    keys = ("question", "completion", "reward", "step")
    resumed = [[row[key] for key in keys] for row in read_jsonl(copy / "samples.jsonl")]
    assert resumed == [[row[key] for key in keys] for row in samples]
    expected = load_file(whole / "adapter_model.safetensors")
    found = load_file(copy / "adapter_model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def means(rows: list[dict]) -> dict[str, float | None]:
    """The averages that a step must log for these samples."""

    def mean(values: list) -> float | None:
        return sum(values) / len(values) if values else None

    valid = [row for row in rows if row["plan"] is not None]
    split = [row for row in valid if row["plan"]["should_decompose"]]
    return {
        "reward": mean([row["reward"] for row in rows]),
        "correctness": mean([row["correct"] for row in rows]),
        "invalid_plan_rate": mean([row["plan"] is None for row in rows]),
        "decomposition_rate": mean([row in split for row in rows]),
        "planner_tokens": mean([row["planner_tokens"] for row in rows]),
        "worker_tokens": mean([row["worker_tokens"] for row in rows]),
        "token_efficiency": mean([row["token_efficiency"] for row in valid]),
        "independence": mean([row["independence"] for row in valid]),
        "subproblems_per_plan": mean([len(row["plan"]["subproblems"]) for row in split]),
        "correct_direct": mean([row["correct"] for row in valid if row not in split]),
        "no_answer_rate": mean([row["answer"] is None for row in rows if row["final"] is not None]),
        "worker_failures": sum(row["error"] is not None for row in rows),
    }


def test_each_line_of_metrics_is_of_the_samples_of_all_ranks(two_ranks):
    _, folder = two_ranks
    samples, lines = read_jsonl(folder / "samples.jsonl"), read_jsonl(folder / "metrics.jsonl")
    would_differ = set()
    for line in lines:
        rows = [row for row in samples if row["step"] == line["step"]]
        expected = means(rows)
        for name, value in expected.items():
            assert line.get(name) == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), name
        # The samples are in the order of the ranks. Would the mean of the ranks' means be another number?
        halves = [means(rows[: len(rows) // 2]), means(rows[len(rows) // 2 :])]
        for name, value in expected.items():
            known = [half[name] for half in halves if half[name] is not None]
            if known and sum(known) / len(known) != pytest.approx(value, rel=1e-5):
                would_differ.add(name)
    assert {"token_efficiency", "subproblems_per_plan"} & would_differ, "this run cannot tell one from the other"


def ranks_of(launcher: int) -> dict[str, int]:
    """Process ids of the ranks that a launcher has started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found |= {entry[5:]: int(child) for entry in environment if entry.startswith("RANK=")}
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize(("who", "launcher"), [("one rank", ACCELERATE), ("all, as from a terminal", LAUNCHER)])
def test_a_signal_ends_all_ranks_with_one_checkpoint_and_the_command_they_were_started_with(tiny_args, who, launcher):
    tiny_args.max_steps, tiny_args.save_steps, tiny_args.worker_max_tokens = 500, 400, 4
    folder = Path(tiny_args.output_dir)
    process = subprocess.Popen(
        [*launcher, str(ROOT / "grpo_training.py"), *flags(tiny_args)], cwd=ROOT, start_new_session=True,
        env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.2)
    if who == "one rank":
        os.kill(ranks_of(process.pid)["1"], signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)  # the launcher then sends it to its ranks a second time
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, "the launcher's own code for ranks that end with an error, or for a signal"
    codes = re.findall(r"exitcode *: (-?\d+)", errors)  # the launcher prints them for ranks that it did not kill
    assert who != "one rank" or (codes and set(codes) == {"143"}), errors[-3000:]
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in errors
    (checkpoint,) = complete_checkpoints(folder)
    steps = checkpoint_step(checkpoint)
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == RANKS
    assert len(read_jsonl(folder / "metrics.jsonl")) == steps
    assert not (folder / "adapter_model.safetensors").exists() and not (folder / ".run.lock").exists()
    (command,) = [line.strip() for line in errors.splitlines() if line.endswith(f"--output-dir {folder} --resume")]
    assert command.startswith(shlex.join([*launcher, str(ROOT / "grpo_training.py")]))
    if who != "one rank":
        return
    done = subprocess.run(
        f"{command} --max-steps {steps + 1}", shell=True, cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_jsonl(folder / "metrics.jsonl")[-1]["step"] == steps + 1


def test_the_scoreboard_is_spread_over_the_ranks_and_is_the_one_of_a_single_process(two_ranks, tmp_path):
    """Five questions: two for one rank, three for the other. Sampled votes also depend only on the question."""
    _, whole = two_ranks
    spread = read_jsonl(whole / "evaluation.jsonl")
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    done = run_script("grpo_training.py", "--output-dir", str(copy), "--eval-only", "--overwrite")
    assert done.returncode == 0, done.stderr
    alone = read_jsonl(copy / "evaluation.jsonl")
    assert len(spread) == 4 * 5 and len({row["planner_output"] for row in spread}) > 3
    for found, expected in zip(spread, alone, strict=True):
        assert found | {"seconds": 0} == expected | {"seconds": 0}
    # All ranks keep the stored rows, and all of them make the missing rows together.
    kept = [row for row in spread if row["row"] == spread[0]["row"]]
    (copy / "evaluation.jsonl").write_text("".join(json.dumps(row | {"seconds": 12345}) + "\n" for row in kept))
    done = torchrun("--output-dir", str(copy), "--eval-only")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("as in evaluation.jsonl") == 1 and done.stdout.count("95% interval") == 1
    again = read_jsonl(copy / "evaluation.jsonl")
    assert {row["seconds"] for row in again[:5]} == {12345}
    for found, expected in zip(again, alone, strict=True):
        assert found | {"seconds": 0} == expected | {"seconds": 0}
