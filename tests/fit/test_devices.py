"""One GPU for one process, and the allocator: both are set in the environment before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common.fit.devices import ALLOCATOR, VISIBLE, allocator, choose_gpu


@pytest.mark.parametrize(
    ("environment", "installed", "chosen"),
    [
        ({}, 4, "0"),
        ({VISIBLE: "2,3"}, 4, "2"),
        ({VISIBLE: "GPU-5f, GPU-a1"}, 2, "GPU-5f"),
        ({VISIBLE: "1"}, 4, None),
        ({VISIBLE: ""}, 4, None),
        ({VISIBLE: "3,-1,2"}, 4, None),
        ({}, 1, None),
        ({}, 0, None),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "4"}, 4, None),
    ],
)
def test_a_process_without_a_launcher_takes_the_first_visible_gpu(environment, installed, chosen):
    before = dict(environment)
    line = choose_gpu(environment, lambda: installed, "grpo_training.py")
    if chosen is None:
        assert line is None and environment == before
        return
    assert environment == {**before, VISIBLE: chosen}
    count = len(before.get(VISIBLE, "0,1,2,3").split(","))
    assert f"torchrun --nproc_per_node {count} grpo_training.py" in line and "\n" not in line


def test_the_allocator_is_the_users_where_he_set_one():
    assert allocator({}) == {ALLOCATOR: "expandable_segments:True"}
    assert allocator({ALLOCATOR: "max_split_size_mb:64"}) == {}
    assert allocator({"PYTORCH_ALLOC_CONF": "backend:native"}) == {}


@pytest.mark.parametrize("script", ["grpo_training", "dummy_planner"])
def test_both_are_set_before_torch_is_imported(script, tmp_path):
    """The script stops at its data set, which it checks before it imports anything heavy."""
    code = (
        f"import os, sys, {script}\n"
        f"try: {script}.main(['--base-model', 'packaged/none', '--output-dir', {str(tmp_path / 'run')!r}])\n"
        "except Exception as error: print(type(error).__name__)\n"
        f"print(os.environ[{ALLOCATOR!r}], os.environ[{VISIBLE!r}], 'torch' in sys.modules)"
    )
    free = {name: value for name, value in os.environ.items() if name not in (ALLOCATOR, "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**free, VISIBLE: "0,1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-2:] == ["UserError", "expandable_segments:True 0 False"], done
    assert "2 GPUs are visible" in done.stderr
