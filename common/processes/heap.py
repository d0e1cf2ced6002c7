"""What the C library does with memory that a process frees: kept for the next step, and given back where that pays.

Only glibc (Linux) can be told; elsewhere these functions do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

# Numbers of `mallopt` in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Keep what is freed. Otherwise the large buffers of each step are given back and requested again page by page."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: there is nothing to tune
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)  # no separate mapping for a large buffer
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give back now what is free. After `keep_freed_memory` the gaps between buffers would otherwise grow for long."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
