"""A memory limit as a container or a batch system sets it: a cgroup, whose processes the kernel kills at the limit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def place_for_groups() -> tuple[Path, str] | None:
    """Where a cgroup with a memory limit can be made, and the name of the limit's file; None if it cannot."""
    for folder, limit in ((ROOT / "memory", "memory.limit_in_bytes"), (ROOT, "memory.max")):
        controllers = folder / "cgroup.controllers"
        known = limit != "memory.max" or (controllers.is_file() and "memory" in controllers.read_text().split())
        if known and folder.is_dir() and os.access(folder, os.W_OK):
            return folder, limit
    return None


@contextmanager
def memory_limit(megabytes: int) -> Iterator[Path]:
    """A cgroup with a limit. Yields its `cgroup.procs`; a process joins by writing its id there.

    Pages that a forked process shares with its parent count as the parent's until they are changed.
    """
    found = place_for_groups()
    assert found is not None, "no cgroup can be made here"
    folder = found[0] / f"campaign-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        (folder / found[1]).write_text(str(megabytes << 20))
        yield folder / "cgroup.procs"
    finally:
        for _ in range(100):
            try:
                folder.rmdir()
                break
            except OSError:  # the last process of it has not quite ended
                time.sleep(0.1)
