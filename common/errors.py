"""Errors that a user can correct. The scripts show them as one line, never as a traceback."""

from __future__ import annotations


def in_one_line(text: str) -> str:
    """A message without line breaks and control characters. Messages quote files and servers, which may contain them.

    A terminal would execute control characters. And someone who reads only the last line of a log must find the whole
    message there.
    """
    return "".join(char if char.isprintable() else " " if char.isspace() else "?" for char in text)


class UserError(Exception):
    """One line that says what is wrong, what was found and how to fix it.

    Args:
        message: that line.
        exit_code: of the script: 2 for bad input; 1 if the input was fine but the run could not continue (no network,
            no memory, a worker that always fails). `common.cli` lists all exit codes.
    """

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(in_one_line(message))
        self.exit_code = exit_code


class UserErrors(UserError):
    """Several problems found in one check, so that a user can fix all of them at once; one line each."""

    def __init__(self, messages: list[str], *, exit_code: int = 2) -> None:
        super().__init__("", exit_code=exit_code)
        self.messages = [in_one_line(message) for message in messages]
        self.args = ("\n".join(self.messages),)
