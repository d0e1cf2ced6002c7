"""A resumed training continues its W&B run: the real scripts, the real library in offline mode."""

from __future__ import annotations

import shutil
from pathlib import Path

from conftest import flags, run_script
from test_wandb_log import history_of

from common import models


def test_a_resumed_training_is_one_run_with_no_step_twice(tiny_args, tmp_path):
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "RECURSIVE_REASONER_CACHE": str(models.cache_dir())}
    folder = Path(tiny_args.output_dir)
    tiny_args.wandb, tiny_args.max_steps, tiny_args.save_steps = True, 3, 2

    def train(*more: str) -> tuple[list[Path], str]:
        done = run_script("grpo_training.py", *more, env=home)
        assert done.returncode == 0, done.stderr
        parts = sorted(folder.glob("wandb/offline-run-*"))
        (line,) = [line for line in done.stderr.splitlines() if "wandb sync" in line]
        return parts, line

    (first,), _ = train(*flags(tiny_args))
    shutil.rmtree(folder / "checkpoint-3")  # as if it had been stopped after step 3: the last checkpoint is of step 2
    parts, line = train("--output-dir", str(folder), "--resume", "--max-steps", "4")
    run_id = first.name.split("-")[-1]
    assert [part.name.split("-")[-1] for part in parts] == [run_id, run_id]
    assert line.endswith(f"wandb sync {parts[0].resolve()} {parts[1].resolve()}"), "both, in the order of time"
    rows = [row for part in parts for row in history_of(part)]
    steps = [row["train/global_step"] for row in rows if "train/loss" in row and "train/runtime" not in row]
    assert steps == [1, 2, 3, 4]
    assert [row["_step"] for row in rows] == list(range(len(rows))), "W&B's own count goes on too"
    examples = [row["examples"] for row in history_of(parts[1]) if "examples" in row]
    assert sum(cell["nrows"] for cell in examples) == 8, "of step 4 alone"

    tiny_args.max_steps = 1
    parts, line = train(*flags(tiny_args), "--overwrite")
    fresh = parts[-1].name.split("-")[-1]
    assert len(parts) == 3 and fresh != run_id and run_id not in line
