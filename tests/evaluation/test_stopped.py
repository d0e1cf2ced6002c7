"""A scoreboard that is stopped by a signal goes on after the questions that it has saved."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from conftest import ROOT, flags, run_script

from common.evaluation.scoreboard import DIRECT, RECORDS
from common.reports.jsonl import read_jsonl


def test_stopped_before_training_the_same_command_goes_on_after_the_saved_questions(tiny_args):
    """There is no checkpoint yet, so nothing could be resumed, and the questions are all that the run has answered."""
    tiny_args.max_steps, tiny_args.eval_samples, tiny_args.eval_dataset = 1, 300, "generated:shares?people=3"
    rows = Path(tiny_args.output_dir) / RECORDS
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "grpo_training.py"), *flags(tiny_args)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while not rows.exists():
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[1]
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 143, errors
    assert errors.splitlines()[-1].endswith("continue after its saved questions with the same command"), errors
    kept = read_jsonl(rows)
    assert {row["row"] for row in kept} == {DIRECT} and len(kept) in (100, 200), len(kept)
    done = run_script("grpo_training.py", *flags(tiny_args))
    assert done.returncode == 0, done.stderr
    assert f"{DIRECT}: the first {len(kept)} questions as in {RECORDS}" in done.stderr
    plain = [{**row, "seconds": None} for row in kept]
    assert [{**row, "seconds": None} for row in read_jsonl(rows)[: len(kept)]] == plain
    assert Counter(row["row"] for row in read_jsonl(rows))[DIRECT] == 300
