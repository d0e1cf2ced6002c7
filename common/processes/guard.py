"""Run a command as a child, and end it and its process group surely: python guard.py COMMAND…

A server can lose a signal while it starts (vLLM does, while it loads its libraries). So whoever starts a server does it
through this program, which starts at once, asks the child to end every second, and kills it at last. It is asked itself
by SIGTERM: by the process that started it, or by the kernel when that process has ended (`servers.vllm.start`).

It runs on its own, so it imports only the standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends
PATIENCE_SECONDS = 20.0


def main(command: list[str]) -> int:
    """Start the command and wait for its end. Returns its exit code, 128 + N if signal N has ended it."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: asked.append(got))
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_guard() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    child = subprocess.Popen(command, preexec_fn=end_with_guard)
    asked_at = last = 0.0
    while child.poll() is None:
        now = time.monotonic()
        if asked and now - last >= 1:
            asked_at, last = asked_at or now, now
            if now - asked_at > PATIENCE_SECONDS:
                break
            child.terminate()
        time.sleep(0.1)
    if asked:  # the command's own children are in this process group too
        os.killpg(0, signal.SIGKILL)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
