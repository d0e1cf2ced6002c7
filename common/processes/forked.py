"""Work that copies of this process share (fork), where torch's own threads would mostly wait for each other.

torch divides each small product among its threads, and lets them meet after each: for a model of 135M parameters that
is thousands of meetings a second. Copies of the process, with one thread each and a part of the batch, never meet
(docs/performance.md has figures). A copy shares the memory of the process until one of them writes to it, so the model
is not copied.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from common.processes.guard import PR_SET_PDEATHSIG

Part = TypeVar("Part")
Result = TypeVar("Result")

# Only Linux: elsewhere libraries of the system may not be used after a fork, or there is none.
CAN_FORK = sys.platform == "linux"
# Errors that are raised in the parent as what they were in a copy. Any other one is a RuntimeError that names it.
_RESTORED = {kind.__name__: kind for kind in (MemoryError, RuntimeError, ValueError)}


def forked(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Call `work` for all parts at the same time, with one torch thread each: the first here, the others in copies.

    What `work` changes in memory is lost in a copy; only its result comes back. It must not write files or use other
    threads of this process. A copy ends with this process, and leaves signals to it.

    Args:
        work: what to do with a part. Its results must be JSON-ready: a copy's come back as JSON, tuples as lists.
        parts: at least one.

    Returns:
        The results, in the order of the parts.

    Raises:
        MemoryError: if a copy was killed, as the system does if memory runs out.
        Exception: what `work` raised here. What it raised in a copy is a MemoryError, a ValueError or a RuntimeError.
    """
    copies: list[_Copy | None] = []
    results: list[Result] = []
    try:
        for part in parts[1:]:
            copies.append(_started(work, part))
        with one_thread():
            results.append(work(parts[0]))
            for part, copy in zip(parts[1:], copies, strict=True):
                # No copy: the system had no memory or no process number left, so its part is done here.
                results.append(work(part) if copy is None else copy.result())
    finally:
        for copy in copies:
            if copy is not None:
                copy.end()
    return results


@dataclass(slots=True)
class _Copy:
    """A copy of this process that works on a part.

    Attributes:
        pid: of the copy; 0 after it has ended.
        pipe: file descriptor from which its result is read; -1 after that.
    """

    pid: int
    pipe: int

    def result(self) -> Any:
        """Wait for the result.

        Raises:
            MemoryError, RuntimeError: if the copy ended without one.
            MemoryError, ValueError, RuntimeError: for what the work raised.
        """
        with os.fdopen(self.pipe, "rb") as pipe:
            self.pipe = -1
            sent = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            why = f"a process that worked on a part of the batch was ended by signal {number}"
            if number == signal.SIGKILL:
                raise MemoryError(f"{why}, as the system does if memory runs out")
            raise RuntimeError(why)
        answer = json.loads(sent)
        if "result" in answer:
            return answer["result"]
        kind = _RESTORED.get(answer["error"])
        raise kind(answer["text"]) if kind else RuntimeError(f"{answer['error']}: {answer['text']}")

    def end(self) -> None:
        """Kill the copy if it has not ended by itself."""
        if self.pipe != -1:
            os.close(self.pipe)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.pid, self.pipe = 0, -1


def _started(work: Callable[[Part], Any], part: Part) -> _Copy | None:
    """Start a copy that works on a part; None if the system allows no more processes."""
    libc = ctypes.CDLL(None)
    here = os.getpid()
    receiving, sending = os.pipe()
    # A terminal and a job scheduler send these to all processes; what to do is decided here. A copy never hears them,
    # from its first moment on, because a handler of the parent must not run in it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        pid = os.fork()
        if pid == 0:
            _work_and_exit(work, part, sending, here, libc)
    except OSError:
        os.close(receiving)
        return None
    finally:
        os.close(sending)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _Copy(pid, receiving)


def _work_and_exit(work: Callable[[Part], Any], part: Part, pipe: int, parent: int, libc: ctypes.CDLL) -> NoReturn:
    """The life of a copy: work on the part, send the result, exit without the parent's exit functions and buffers."""
    code = 1
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            gc.disable()  # collecting writes to all objects, and thereby copies their memory
            with os.fdopen(pipe, "wb") as out:
                out.write(_answer(work, part))
            code = 0
    finally:
        os._exit(code)


def _answer(work: Callable[[Part], Any], part: Part) -> bytes:
    """The result or the error as JSON, not as a pickle: what is loaded here can be nothing but data."""
    try:
        with one_thread():  # the others were not copied, and the processes share the cores
            return json.dumps({"result": work(part)}).encode()
    except Exception as error:  # noqa: BLE001 - it is raised in the parent
        return json.dumps({"error": type(error).__name__, "text": str(error)}).encode()


@contextmanager
def one_thread() -> Iterator[None]:
    """Context manager: inside it, torch computes on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
