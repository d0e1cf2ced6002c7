"""Scripts on two processes over gloo, as torchrun and accelerate start them on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT

RANKS = 2
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), "--standalone"]
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(RANKS),
    "--main_process_port", "0",
]  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def torchrun(*given: str, launcher: list[str] = LAUNCHER) -> subprocess.CompletedProcess[str]:
    """Run `grpo_training.py` with these flags to its end."""
    return subprocess.run(
        [*launcher, str(ROOT / "grpo_training.py"), *given],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
