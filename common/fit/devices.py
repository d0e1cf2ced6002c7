"""Which GPU a run uses, and how torch allocates its memory. Both are set before torch is imported, which reads them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, MutableMapping
from pathlib import Path

from common.cli import say

VISIBLE, ALLOCATOR = "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"
_DRIVER = Path("/proc/driver/nvidia/gpus")  # contains a folder for each GPU


def prepare_gpu(script: str) -> None:
    """Set the environment variables that torch reads when it is imported. Print a line if a GPU stays unused.

    Args:
        script: name of the script, for the command that uses all GPUs.
    """
    os.environ.update(allocator(os.environ))
    message = choose_gpu(os.environ, installed_gpus, script)
    if message is not None:
        say(message)


def allocator(environment: MutableMapping[str, str]) -> dict[str, str]:
    """The variable for an allocator whose blocks can grow; {} if the user has configured the allocator.

    Rollouts, worker and training need blocks of different sizes in turn. Blocks of fixed size would often stay unused.

    Args:
        environment: variables of the process.
    """
    return {} if {ALLOCATOR, "PYTORCH_ALLOC_CONF"} & set(environment) else {ALLOCATOR: "expandable_segments:True"}


def choose_gpu(environment: MutableMapping[str, str], installed: Callable[[], int], script: str) -> str | None:
    """Leave only one GPU visible to a process without a launcher.

    With several visible GPUs, the Trainer would split each batch with `torch.nn.DataParallel`. That supports neither
    the worker's calls nor a quantised model.

    Args:
        environment: variables of the process, changed in place.
        installed: returns the number of GPUs of the machine; called if the environment does not list visible ones.
        script: name of the script.

    Returns:
        A line for the user, or None if at most one GPU is visible or a launcher chooses.
    """
    if "LOCAL_RANK" in environment or "WORLD_SIZE" in environment:
        return None  # torchrun or accelerate launch: each process has its own
    if VISIBLE in environment:
        visible = [name.strip() for name in environment[VISIBLE].split(",") if name.strip()]
        if "-1" in visible:  # CUDA ignores "-1" and all entries after it
            visible = visible[: visible.index("-1")]
    else:
        visible = [str(number) for number in range(installed())]
    if len(visible) < 2:
        return None
    environment[VISIBLE] = visible[0]
    return (
        f"{len(visible)} GPUs are visible, and one process trains on one: GPU {visible[0]} is used. For all of them: "
        f"torchrun --nproc_per_node {len(visible)} {script} … (or accelerate launch)"
    )


def installed_gpus() -> int:
    """Number of NVIDIA GPUs according to the driver, or else according to nvidia-smi; 0 if neither exists."""
    if _DRIVER.is_dir():
        return sum(1 for _ in _DRIVER.iterdir())
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())
