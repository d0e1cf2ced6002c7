"""Command lines read off a settings dataclass, and how a script ends.

Shared by the entry scripts, so that flags, defaults, error lines and exit codes look the same everywhere:
0 done, 1 the run failed, 2 bad input, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any, NoReturn

from common.errors import UserError
from common.settings import secrets
from common.settings.fields import flag_of


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage text in front of it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_run_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags every training script has besides its settings; returns their group."""
    group = parser.add_argument_group("run")
    group.add_argument("--demo", action="store_true", help="a small preset for a CPU; explicit flags override it")
    group.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    group.add_argument("--overwrite", action="store_true", help="replace a run that --output-dir holds")
    group.add_argument("--debug", action="store_true", help="show tracebacks and library warnings")
    return group


def check_run_flags(options: argparse.Namespace) -> None:
    """Stop for flags that contradict each other.

    Raises:
        UserError: for --resume with --overwrite.
    """
    if options.resume and options.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: leave one of them out")


def add_settings(
    parser: argparse.ArgumentParser, settings: type, defaults: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Add one flag per dataclass field, grouped, with its default in the help text.

    Only flags that the user gave end up in the namespace, so that a preset can lie between
    the defaults and what was asked for explicitly.

    Args:
        defaults: of fields that have none of their own, for the help text.
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
    """The settings that the user gave on the command line."""
    names = {spec.name for spec in fields(settings)}
    return {name: value for name, value in vars(namespace).items() if name in names}


def settings_table(settings: Any, defaults: Any) -> str:
    """The settings of a run, one group a line; `*` marks what differs from the default."""
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
    """Make a package look as if it were not installed: TRL imports W&B on its own wherever it finds it."""
    sys.modules[package] = None  # type: ignore[assignment]


def say(message: str) -> None:
    """One line for the person at the terminal, on stderr, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


class GuardedStream(io.TextIOWrapper):
    """stdout or stderr, whoever writes to it (a library's log and a traceback too): no key gets through.

    What the terminal's or the pipe's encoding lacks becomes a question mark: a script whose work is done must not
    end at a character that cannot be shown.
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
        super().write(secrets.redact(text))
        return len(text)


def guard_streams() -> None:
    """Let all that this process prints pass through `GuardedStream`; what it reads never ends it either."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # None without a terminal on Windows; a notebook has its own
            setattr(sys, name, GuardedStream(stream))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def run(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a script's `main` and exit: user errors become one line each and their exit code.

    With `--debug` every error keeps its traceback. An unforeseen error is one line too (its type and
    message), with exit code 1, and says how to see the rest. No key of the environment, the command line or a login
    is ever printed.
    """
    secrets.protect_process(sys.argv)
    guard_streams()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if "--debug" not in sys.argv:
        for name in ("bitsandbytes", "huggingface_hub"):  # a missing kernel, every retry: the outcome is told below
            logging.getLogger(name).setLevel(logging.ERROR)
    # Read when torch loads its thread library: threads that wait shall sleep, not spin. On a machine that does
    # something else too, spinning costs several times the work itself (docs/results.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    program = os.path.basename(sys.argv[0])  # noqa: PTH119 - pathlib costs import time and gives the same
    try:
        code = main(None)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        for line in str(error).splitlines():
            print(f"{program}: error: {line}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        code = 130
    except ModuleNotFoundError as error:
        if "--debug" in sys.argv:
            raise
        print(
            f"{program}: error: the package {error.name} is not installed for {sys.executable}: use .venv/bin/python, "
            "which make demo fills, or pip install -r requirements.txt",
            file=sys.stderr,
        )
        code = 1
    except Exception as error:  # the last line of defence: shown, and a failure
        if "--debug" in sys.argv:
            raise
        first = str(error).strip().splitlines()
        print(
            f"{program}: error: {type(error).__name__}: {first[0] if first else '(no message)'} (--debug shows where)",
            file=sys.stderr,
        )
        code = 1
    sys.exit(code)
