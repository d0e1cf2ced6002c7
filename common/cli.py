"""Build a script's flags from a settings dataclass, and run its main function.

All entry scripts use it, so that flags, defaults, error lines and exit codes are the same everywhere. Exit codes:
0 done, 1 the run failed, 2 bad input, 3 a server answers with the wrong model, 4 a merged model differs too much,
130 or 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import logging
import os
import re
import sys
import textwrap
import time
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from common.errors import UserError
from common.processes.ranks import is_first, rank, world_size
from common.settings import secrets
from common.settings.fields import flag_of


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage text before it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with code 2."""
        if message.startswith("unrecognized arguments:"):
            message += self._meant(message)
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _meant(self, message: str) -> str:
        """The known flag that is closest to an unknown one, as a question; "" where none is close."""
        import difflib

        unknown = next((word.partition("=")[0] for word in message.split() if word.startswith("--")), "")
        close = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.7)
        return f": did you mean {close[0]}?" if close else ""


def count(text: str) -> int:
    """The value of a flag that counts something: a whole number from 1 (a `type` of `add_argument`)."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {number}")
    return number


def add_run_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that every training script has besides its settings; returns their group."""
    group = parser.add_argument_group("run")
    group.add_argument("--demo", action="store_true", help="a small preset for a CPU; explicit flags override it")
    group.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a run in --output-dir, which is kept until the new one has a checkpoint",
    )
    group.add_argument("--debug", action="store_true", help="show tracebacks and library warnings")
    return group


def check_run_flags(options: argparse.Namespace) -> None:
    """Check that flags do not contradict each other.

    Raises:
        UserError: for --resume together with --overwrite.
    """
    if options.resume and options.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: leave one of them out")


def add_settings(
    parser: argparse.ArgumentParser, settings: type, defaults: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Add one flag per field of a settings dataclass, in groups, with its default in the help text.

    Only flags that the user gave are stored in the namespace. So a preset can replace defaults without replacing what
    the user asked for.

    Args:
        parser: the flags are added here.
        settings: a dataclass whose fields come from `common.settings.fields`.
        defaults: defaults to show in the help text for fields that have no default of their own.
    """
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(settings)
    for spec in fields(settings):
        group = spec.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        hint = hints[spec.name]
        options = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if isinstance(hint, types.UnionType):
            hint = options[0]
        default = defaults.get(spec.name, spec.default)
        shown = "" if default in (None, MISSING) else f" (default: {default})"
        kwargs: dict[str, Any] = {
            "dest": spec.name,
            "default": argparse.SUPPRESS,
            "help": (spec.metadata["help"] + shown).replace("%", "%%"),
        }
        if hint is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is typing.Literal:
            kwargs["choices"] = typing.get_args(hint)
        else:
            kwargs["type"] = hint
            kwargs["metavar"] = spec.metadata.get("metavar", {int: "N", float: "X"}.get(hint, "TEXT"))
        groups[group].add_argument(flag_of(spec.name), **kwargs)


def given_settings(namespace: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The settings that the user gave on the command line, by field name."""
    names = {spec.name for spec in fields(settings)}
    return {name: value for name, value in vars(namespace).items() if name in names}


def settings_table(settings: Any, defaults: Any) -> str:
    """The settings of a run as text, one group per line; `*` marks a value that differs from `defaults`."""
    groups: dict[str, list[str]] = {}
    for spec in fields(settings):
        value = getattr(settings, spec.name)
        mark = "*" if value != getattr(defaults, spec.name) else ""
        groups.setdefault(spec.metadata["group"], []).append(f"{spec.name}{mark}={value}")
    width = max(map(len, groups))
    return "\n".join(
        textwrap.fill(
            f"{group:<{width}}  " + "  ".join(values),
            width=120,
            subsequent_indent=" " * (width + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for group, values in groups.items()
    )


def forbid_import(package: str) -> None:
    """Make a package look as if it were not installed. TRL imports W&B by itself wherever it is installed."""
    sys.modules[package] = None  # type: ignore[assignment]


def say(message: str) -> None:
    """Print one line for the user on stderr, from the first process of a run only."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


def counted(number: int, noun: str, style: str = "d") -> str:
    """A number with its noun: `1 question`, `2 questions`; with the style "," also `2,000 questions`."""
    return f"{number:{style}} {noun}{'' if number == 1 else 's'}"


class GuardedStream(io.TextIOWrapper):
    """stdout or stderr that replaces secrets in everything written, also in library logs and tracebacks.

    A character that the terminal's or pipe's encoding lacks becomes a question mark. A script must not fail after its
    work is done, only because a character cannot be shown.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.flush()
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="replace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        """Write text without secrets. Returns the length of `text` in characters, as the caller expects."""
        super().write(secrets.redact(text))
        return len(text)


def guard_streams() -> None:
    """Send everything this process prints through `GuardedStream`; undecodable input does not end the script either."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # otherwise no terminal (Windows), or a notebook's own stream
            setattr(sys, name, GuardedStream(stream))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def run(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a script's `main` and exit with its code. Does not return.

    Each user error becomes one line. Any other error becomes one line too, with its type and message and exit code 1,
    and says how to see the traceback. `--debug` prints the traceback before these lines. Secrets from the environment,
    the command line or a login are never printed.

    Args:
        main: takes the command line (None for `sys.argv`) and returns the exit code.
    """
    secrets.protect_process(sys.argv)
    guard_streams()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if "--debug" not in sys.argv:
        # If missing kernels or failed retries matter, the script prints an error of its own. huggingface_hub sets its
        # level when it is imported, so the variable is needed.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # torch reads this when it loads its thread library. Waiting threads then sleep. By default they run a busy loop,
    # which makes products several times as slow if other programs use the processor (docs/results.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    program = os.path.basename(sys.argv[0])  # noqa: PTH119 - pathlib costs import time and gives the same
    if not is_first():
        program += f" (process {rank()})"  # shows whether one process or all report an error
    try:
        code = main(None)
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        code = 130
    except Exception as error:  # noqa: BLE001 - last resort: any error is told in one line
        if "--debug" in sys.argv:
            print(traceback.format_exc(), end="", file=sys.stderr)
        lines, code = _told(error)
        for line in lines:
            print(f"{program}: error: {line}", file=sys.stderr)
        _tell_launcher(lines)
    sys.exit(code)


def _tell_launcher(lines: Sequence[str]) -> None:
    """Leave the error for torchrun or accelerate, which end with a long report: it then shows the error at its end.

    The format is that of `torch.distributed.elastic.multiprocessing.errors`, which would have to import torch.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = secrets.redact("\n".join(lines))
        message = {"message": told, "extraInfo": {"py_callstack": told, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # the lines have been printed
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def _told(error: Exception) -> tuple[list[str], int]:
    """The lines that tell an error to the user, and the exit code."""
    if isinstance(error, UserError):
        return str(error).splitlines(), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        way = "use .venv/bin/python, which make demo fills, or pip install -r requirements.txt"
        return [f"the package {error.name} is not installed for {sys.executable}: {way}"], 1
    if world_size() > 1 and _OTHER_ENDED.search(str(error)):
        return ["another process of this run has ended, so this one ends too: its own line says why"], 1
    first = str(error).strip().splitlines()
    told = f"{type(error).__name__}: {first[0] if first else '(no message)'}"
    return [f"{told} ({_limit_reached(error) or '--debug shows where'})"], 1


def _limit_reached(error: BaseException) -> str | None:
    """What to do if a limit of the machine (open files, memory) caused the error; None for any other error."""
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if number in (errno.EMFILE, errno.ENFILE):
            return "too many open files: raise the limit, such as with `ulimit -n 4096`, then the same command again"
        if number == errno.ENOMEM or isinstance(seen, MemoryError) or _NO_MEMORY.search(str(seen)):
            return f"memory ran out: {_MORE_MEMORY}"
        if "can't start new thread" in str(seen):  # pthreads gives one reason for both
            return f"memory or the number of processes (`ulimit -u`) ran out: {_MORE_MEMORY}"
        if "could not create a primitive" in str(seen):  # oneDNN gives no reason
            return f"oneDNN says this mostly when memory ran out: {_MORE_MEMORY}"
        seen = seen.__cause__ or seen.__context__
    return None


# What gloo and NCCL say when the process at the other end of a connection is gone.
_OTHER_ENDED = re.compile(
    r"gloo/transport/.*(?:closed by peer|reset by peer|Broken pipe)|remote process exited", re.DOTALL
)
_MORE_MEMORY = "use smaller batches or a machine with more, then --resume or the same command again"
_NO_MEMORY = re.compile(
    r"can't allocate memory|[Cc]annot allocate memory|bad_alloc|not enough memory|failed to map segment"
)
