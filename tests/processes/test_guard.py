"""The guard of a server: signals that are lost while it starts, exit codes, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.processes import guard

ROOT = Path(__file__).resolve().parents[2]
# A server with a worker of its own. Like vLLM it hears no SIGTERM while it starts.
SERVER = (
    "import os, signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(os.getpid(), worker.pid, flush=True)\n"
    "time.sleep(2.5)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
    "time.sleep(600)\n"
)
RUN = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from common.servers import vllm\n"
    "server = vllm.start(Path(sys.executable), ['-c', sys.argv[1]])\n"
    "time.sleep(600)\n"
)


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's signal at the end of a parent")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_misses_the_first_signal_still_ends_with_the_run(number):
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, SERVER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    pids = [int(word) for word in run.stdout.readline().split()]
    assert len(pids) == 2 and all(map(runs, pids))
    run.send_signal(number)
    run.wait()
    deadline = time.monotonic() + 60
    while any(map(runs, pids)):
        assert time.monotonic() < deadline, "the server goes on without its run"
        time.sleep(0.1)


@pytest.mark.parametrize(("code", "told"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_the_end_of_a_server_that_nobody_asked_to_end_is_told(code, told):
    command = [sys.executable, "-I", guard.__file__, sys.executable, "-c", code]
    assert subprocess.run(command, start_new_session=True, check=False).returncode == told
