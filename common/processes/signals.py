"""End work that has no checkpoint of its own on Ctrl-C or SIGTERM, with one line that says how to go on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from common.errors import UserError
from common.processes.launcher import is_elastic


@contextmanager
def stoppable(go_on: Callable[[], str]) -> Iterator[None]:
    """Context manager: a signal ends the work at once. Use it in the main thread.

    With several processes, one that ends makes the launcher send SIGTERM to the others.

    Args:
        go_on: returns what was stopped and how to go on.

    Raises:
        UserError: after a signal, with exit code 128 + its number.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, before in previous.items():
            # A launcher repeats the signal while the process is ending. Otherwise a second one ends it without a word.
            signal.signal(each, signal.SIG_IGN if is_elastic() else before)
        raise KeyboardInterrupt  # unlike an `Exception`, it passes code that goes on after errors

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, end)
    try:
        yield
    except KeyboardInterrupt:
        if not received:
            raise
        raise UserError(go_on(), exit_code=128 + received[0]) from None
    finally:
        if not received:
            for number, before in previous.items():
                signal.signal(number, before)
