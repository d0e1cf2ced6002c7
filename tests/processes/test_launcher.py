"""The command for starting a run again is the command with which it was started."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = "from common.processes.launcher import patience_hint, start_command\nprint(start_command('train.py'), patience_hint())"


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def told(*command: str, **environment: str) -> str:
    cleared = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**cleared, "PYTHONPATH": str(ROOT), **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_python_alone_and_processes_whose_launcher_is_not_known(script):
    python = shlex.quote(sys.executable)
    assert told(sys.executable, str(script)) == f"{python} {script} None"
    found = told(sys.executable, str(script), WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    assert found == f"ACCELERATE_USE_CPU=true torchrun --nnodes 2 --nproc_per_node 2 {script} None"


@pytest.mark.skipif(sys.platform != "linux", reason="the launcher's command is read from /proc")
def test_a_launcher_is_named_with_its_own_flags(script):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
    found = told(*launcher, str(script), "--flag", ACCELERATE_USE_CPU="true")
    command, hint = found.split(" a signal ")
    assert command == f"ACCELERATE_USE_CPU=true {shlex.join([*launcher, str(script)])}"
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in hint
    patient = [*launcher, "--shutdown-timeout", "300"]
    assert told(*patient, str(script)) == f"{shlex.join([*patient, str(script)])} None"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    assert told(*accelerate, str(script)) == f"{shlex.join([*accelerate, str(script)])} None"


@pytest.mark.skipif(sys.platform != "linux", reason="the launcher is found in /proc")
def test_accelerate_that_starts_one_process_of_two_is_told(tmp_path):
    """Otherwise a run would have half the completions a step, and a record of one process."""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
         str(ROOT / "dummy_planner.py"), "--demo", "--output-dir", str(tmp_path / "run")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dummy_planner.py: error: ")]
    assert "accelerate launch --multi_gpu --num_processes N" in line
    assert done.returncode == 1 and not (tmp_path / "run").exists(), "accelerate's own code for any error"


def test_an_error_stands_at_the_end_of_the_launchers_own_report():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "grpo_training.py"), "--lr", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    said = done.stderr.count("error: --lr must be greater than 0, found 0.0")
    assert done.returncode == 1 and said in (1, 2), "the launcher may end the second process before it says the same"
    cause = done.stderr.rpartition("Root Cause")[2]
    assert "exitcode  : 2" in cause and "traceback : --lr must be greater than 0, found 0.0" in cause, cause
