"""Which GPU a run takes, and how torch uses its memory: decided before torch is imported, which reads it then."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, MutableMapping
from pathlib import Path

from common.cli import say

VISIBLE, ALLOCATOR = "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"
_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU


def prepare_gpu(script: str) -> None:
    """Set what torch reads from the environment when it is imported, and say so where a GPU is left unused.

    Args:
        script: name of the script, for the command that uses all GPUs.
    """
    os.environ.update(allocator(os.environ))
    message = choose_gpu(os.environ, installed_gpus, script)
    if message is not None:
        say(message)


def allocator(environment: MutableMapping[str, str]) -> dict[str, str]:
    """What makes torch's GPU memory grow in place of being cut into pieces, unless the user has set something.

    Rollouts, worker and training take blocks of other sizes in turn, so that fixed ones would lie about unused.
    """
    return {} if {ALLOCATOR, "PYTORCH_ALLOC_CONF"} & set(environment) else {ALLOCATOR: "expandable_segments:True"}


def choose_gpu(environment: MutableMapping[str, str], installed: Callable[[], int], script: str) -> str | None:
    """Leave one GPU visible to a process that no launcher started; with more, the Trainer would split each batch.

    It does so by `torch.nn.DataParallel`, which takes neither the worker's calls nor a quantised model.

    Args:
        environment: of the process, changed in place.
        installed: how many GPUs the machine has, asked where the environment does not say which are visible.
        script: its name.

    Returns:
        a line for the user, or None where there is nothing to choose.
    """
    if "LOCAL_RANK" in environment or "WORLD_SIZE" in environment:
        return None  # torchrun or accelerate launch: each process has its own
    if VISIBLE in environment:
        visible = [name.strip() for name in environment[VISIBLE].split(",") if name.strip()]
        if "-1" in visible:  # hides those behind it
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
    """How many NVIDIA GPUs the driver knows, else nvidia-smi; 0 without either."""
    if _DRIVER.is_dir():
        return sum(1 for _ in _DRIVER.iterdir())
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())
