"""Scripts on two processes over gloo, as `torchrun` starts them on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT

RANKS = 2
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), "--standalone"]
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def torchrun(*given: str, script: str = "grpo_training.py") -> subprocess.CompletedProcess[str]:
    """Run a script with these flags to its end."""
    return subprocess.run(
        [*LAUNCHER, str(ROOT / script), *given],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
