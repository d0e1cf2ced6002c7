"""The processes of one run: the number of this one, its share of the work, and how they exchange values.

A launcher (torchrun, accelerate) numbers the processes in environment variables. Other modules get number and count
from here; only what depends on one machine (LOCAL_RANK, LOCAL_WORLD_SIZE) is read where it is used. torch is imported
only where the processes exchange values.

An error in one process is not passed on here. torchrun ends the others (`launcher.is_elastic`), and failed rollouts are
told to all (`workers/rollouts.py`). A signal stops all at the same step (`StopOnSignal` in `training/callbacks.py`).
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

# Processes wait for each other where they exchange values. One whose worker writes long answers makes the others wait,
# so the limit is two hours and not ten minutes.
PATIENCE_SECONDS = 7200


def rank() -> int:
    """The number of this process, from 0. Process 0 writes the files and the messages for all."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is process 0, which writes for all. It is True if there is only one process."""
    return rank() == 0


def world_size() -> int:
    """The number of processes that train together, as the launcher gives it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(count: int) -> slice:
    """This process's part of `count` items. The items are consecutive, so gathering the parts keeps their order."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def gathered(items: list[T]) -> list[T]:
    """The items of all processes, in the order of their ranks. Every process must call it; it waits for the others."""
    if world_size() == 1:
        return items
    _join()
    import torch.distributed as dist

    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, items)
    return [item for part in found for item in part]


def from_first(value: T) -> T:
    """The value of process 0, returned in every process. All must call it; the others' own values are not used."""
    return gathered([value] if is_first() else [])[0]


def wait_for_all() -> None:
    """Return as soon as every process has called this function."""
    gathered([None])


def _join() -> None:
    """Connect the processes, unless a trainer has already done so."""
    import torch
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=PATIENCE_SECONDS))
