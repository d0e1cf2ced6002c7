"""Errors that are the user's to mend: shown as one line, never as a traceback."""

from __future__ import annotations


class UserError(Exception):
    """What is wrong, what was found and how to fix it, in one line.

    `exit_code` is 2 for bad input (the default) and 1 where the input was fine but the
    run could not go on (no network, no memory, a worker that always fails).
    """

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UserErrors(UserError):
    """Several problems found in one check, so that a user mends them all at once."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages
