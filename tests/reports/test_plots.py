"""The pictures of a run."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
from conftest import ROOT, png_size

from common.reports.jsonl import append_jsonl
from common.reports.plots import plot_training_curves


def synthetic_step(step, rng):
    correct = min(1.0, 0.1 + step / 500 + rng.random() / 5)
    return {
        "step": step,
        "reward": correct + 0.3,
        "reward_std": 0.2,
        "correctness": correct,
        "token_efficiency": 0.6,
        "independence": None if step % 3 else 0.5,
        "decomposition_rate": rng.random(),
        "invalid_plan_rate": 0.0,
        "distinct_plans": 1.0,
        "planner_tokens": 80.0 + step,
        "worker_tokens": 300.0,
    }


@pytest.mark.parametrize("steps", [0, 1, 2, 12, 31, 300])
def test_curves_for_any_number_of_steps(tmp_path, steps):
    rng = random.Random(0)
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "plots" / "curves.png"
    metrics.touch()
    for step in range(1, steps + 1):
        append_jsonl(metrics, synthetic_step(step, rng))
    plot_training_curves(metrics, picture, title="costs $5_x or $6^y {a}")
    width, height = png_size(picture)
    assert width > 1000 and height > 600
    assert picture.stat().st_size > 20_000
    assert [p.name for p in picture.parent.iterdir()] == ["curves.png"]


def test_curves_with_missing_keys_gaps_and_a_torn_line(tmp_path):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    append_jsonl(metrics, {"step": 5, "reward": 0.5, "loss": 0.1})
    append_jsonl(metrics, {"step": 10, "reward": None, "reward_std": 0.1, "correctness": math.nan})
    append_jsonl(metrics, {"step": 10, "reward": 0.7, "reward_std": 0.1})  # a step logged twice: the last counts
    append_jsonl(metrics, {"step": 15, "correctness": 1, "planner_tokens": 0})
    with metrics.open("a") as file:
        file.write('{"step": 20, "rew')
    plot_training_curves(metrics, picture)
    png_size(picture)
    only_loss = tmp_path / "loss.jsonl"
    append_jsonl(only_loss, {"step": 1, "loss": 2.0})
    plot_training_curves(only_loss, picture)
    png_size(picture)


def test_drawing_leaves_no_state_behind(tmp_path):
    """pyplot is not used: its figures would accumulate in a long run, and its backend may need a display."""
    code = (
        "import sys\nfrom common.reports import jsonl, plots\nassert 'matplotlib' not in sys.modules\n"
        "jsonl.append_jsonl(sys.argv[1] + '/m.jsonl', {'step': 1, 'reward': 0.5})\n"
        "plots.plot_training_curves(sys.argv[1] + '/m.jsonl', sys.argv[1] + '/c.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=60)
