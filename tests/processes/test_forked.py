"""Copies of a process that share its work: results, errors, signals, and nothing left running."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.processes.forked import forked


def children() -> list[int]:
    """Processes that this one has started and not waited for."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def test_each_part_is_done_in_a_process_of_its_own_with_one_thread():
    threads = torch.get_num_threads()
    running = children()

    def work(part: int) -> tuple[int, int, float]:
        return (
            os.getpid(),
            torch.get_num_threads(),
            float(torch.full((64, 64), part).float().mm(torch.ones(64, 64))[0, 0]),
        )

    found = forked(work, [1, 2, 3])
    assert [total for _, _, total in found] == [64, 128, 192]
    assert found[0][0] == os.getpid() and len({pid for pid, _, _ in found}) == 3
    assert {count for _, count, _ in found} == {1} and torch.get_num_threads() == threads
    assert children() == running


class Unsendable(Exception):
    """An error that cannot be made again from its text."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("error", "expected"), [(ValueError("no such token"), ValueError), (MemoryError("full"), MemoryError)]
)
def test_an_error_in_any_part_is_raised_here(place, error, expected):
    running = children()

    def work(part: int) -> int:
        if part == place:
            raise error
        return part

    with pytest.raises(expected, match=str(error)):
        forked(work, [0, 1])
    assert children() == running


def test_an_error_that_cannot_be_sent_is_told_as_text():
    def work(part: int) -> int:
        if part == 1:
            raise Unsendable("no", "thing")
        return part

    with pytest.raises(RuntimeError, match="Unsendable: nothing"):
        forked(work, [0, 1])


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGKILL, MemoryError), (signal.SIGUSR1, RuntimeError)])
def test_a_copy_that_dies_is_an_error_and_not_an_empty_result(number, expected):
    def work(part: int) -> int:
        if part == 1:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), number)
        return part

    with pytest.raises(expected, match=f"signal {int(number)}"):
        forked(work, [0, 1])


def test_without_room_for_another_process_the_work_is_done_here(monkeypatch):
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    assert forked(lambda part: (os.getpid(), part), [0, 1]) == [(os.getpid(), 0), (os.getpid(), 1)]


def test_copies_leave_signals_to_the_process_and_end_with_it(tmp_path):
    """A terminal sends Ctrl-C to all processes, and a copy must still deliver. A killed process leaves none behind."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from common.processes.forked import forked\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "def work(part):\n"
        "    os.write(1, b'%d\\n' % os.getpid())\n"  # print may write the number and the line's end apart
        "    time.sleep(float(sys.argv[1]))\n"
        "    return part\n"
        "print('results', forked(work, [0, 1]), flush=True)\n"
    )
    root = Path(__file__).resolve().parents[2]

    def started(seconds: str) -> tuple[subprocess.Popen, set[int]]:
        run = subprocess.Popen(
            [sys.executable, str(script), seconds], stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        return run, {int(run.stdout.readline()), int(run.stdout.readline())}

    run, pids = started("3")
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(run.pid, number)
    assert run.communicate(timeout=60)[0] == "results [0, 1]\n" and run.returncode == 0

    run, pids = started("600")
    (copy,) = pids - {run.pid}
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{copy}").exists() and "Z" not in Path(f"/proc/{copy}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the copy goes on without its parent"
        time.sleep(0.05)
