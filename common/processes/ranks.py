"""The processes of one run: which of them this is, its share of the work, and how they tell each other what they have.

A launcher (torchrun, accelerate) numbers the processes in environment variables, which are read here alone. torch is
imported only where processes talk.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

# A process whose worker has long answers to write holds the others where they meet; two hours, not ten minutes.
PATIENCE_SECONDS = 7200


def rank() -> int:
    """The number of this process; the first one, 0, writes and speaks for all."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all; the only one is."""
    return rank() == 0


def world_size() -> int:
    """How many processes train together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(count: int) -> slice:
    """This process's part of `count` items: consecutive ones, so that gathered parts are in the items' order."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def gathered(items: list[T]) -> list[T]:
    """The items of all processes, in the order of their ranks; every process must call it, and waits for the others."""
    if world_size() == 1:
        return items
    _join()
    import torch.distributed as dist

    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, items)
    return [item for part in found for item in part]


def from_first(value: T) -> T:
    """The first process's value, in all of them; every process must call it. What the others pass is not read."""
    return gathered([value] if is_first() else [])[0]


def wait_for_all() -> None:
    """Return once every process is here."""
    gathered([None])


def _join() -> None:
    """Connect the processes, unless a trainer has done it."""
    import torch
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=PATIENCE_SECONDS))
