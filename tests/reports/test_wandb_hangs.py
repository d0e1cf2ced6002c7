"""A W&B server that takes requests and never answers: runs go on, and say what is left."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from planted import WANDB, everything, found
from wandb_server import WandbServer

# Shorter limits than those of a real run, in a child process, because wandb keeps global state.
CHILD = """
import sys
import dummy_planner
from common.reports import wandb_run
wandb_run.INIT_SECONDS = wandb_run.FINISH_SECONDS = 4.0
sys.exit(dummy_planner.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("starts", [True, False])
def test_a_server_that_hangs_costs_a_supervised_run_nothing_and_what_is_left_is_told(starts, tiny_planner, tmp_path):
    folder = tmp_path / "run"
    with WandbServer(starts) as server:
        done = subprocess.run(
            [
                sys.executable, "-c", CHILD, "--base-model", tiny_planner, "--output-dir", str(folder), "--format",
                "json-plan", "--dataset", "generated:shares", "--max-samples", "6", "--max-seq-len", "200",
                "--batch-size", "2", "--grad-accum", "1", "--save-steps", "9", "--no-4bit",
            ],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
            env={**os.environ, "WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": WANDB},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "adapter_model.safetensors").is_file() and "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("wandb: ")]
    if starts:
        assert told[0].startswith("wandb: run ") and "did not take the rest of the run within 4 s" in told[1], told
    else:
        assert len(told) == 1 and "wandb: offline (the server did not start a run" in told[0], told
    part = Path(shlex.split(told[-1])[-1])
    assert "wandb sync" in told[-1] and list(part.glob("*.wandb"))
    assert not found(WANDB, everything(folder, done.stdout, done.stderr))
