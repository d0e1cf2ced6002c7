"""Fields of settings dataclasses: what the command line needs to know of each, and checks of single values.

Nothing heavy is imported here.
"""

from __future__ import annotations

import math
import os
import types
import typing
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_LARGEST = 2**53  # up to here, every library behind the settings holds whole numbers exactly


def setting(default: Any, group: str, help: str, **extra: Any) -> Any:
    """A dataclass field with the metadata from which `common.cli` builds its flag.

    Args:
        default: value of the field; `MISSING` if it has none.
        group: heading in the help text.
        help: help text of the flag.
        extra: `metavar` for the help text; `positive`, `fraction` (in [0, 1]), `minimum` or `below` (an upper limit that
            is not reached) for `check_values`; `local` for `absolute_paths`: "path", or "name" of something that may also
            be a path.
    """
    return field(default=default, metadata={"group": group, "help": help, **extra})


def flag_of(name: str) -> str:
    """The command-line flag of a field: `max_steps` → `--max-steps`."""
    return {"use_4bit": "--4bit"}.get(name, "--" + name.replace("_", "-"))


def check_values(settings: Any) -> list[str]:
    """Problems with single values of a settings dataclass, one line each."""
    hints = typing.get_type_hints(type(settings))
    found = ((spec, getattr(settings, spec.name)) for spec in fields(settings))
    checked = (_type_problem(spec, hints[spec.name], value) or _problem_with(spec, value) for spec, value in found)
    return [problem for problem in checked if problem is not None]


def absolute_paths(settings: Any) -> dict[str, Any]:
    """All settings as JSON-ready values, with absolute local paths. So they mean the same in every folder."""
    found: dict[str, Any] = asdict(settings)
    for spec in fields(settings):
        value, kind = found[spec.name], spec.metadata.get("local")
        if kind is not None and value is not None:
            found[spec.name] = str(Path(value).absolute()) if kind == "path" else absolute(value)
    return found


def absolute(name: str) -> str:
    """The name of a model or data source: with an absolute path if it is that of a file or folder, else unchanged.

    Symbolic links stay, because what they point to may be exchanged.
    """
    before, source, after = source_parts(name)
    path = os.path.expanduser(source) if source.startswith("~/") else source  # noqa: PTH111
    # os.path, because pathlib raises an error for names that no file can have.
    if not path or name.startswith("packaged/") or not os.path.exists(path):  # noqa: PTH110
        return name
    return f"{before}{Path(path).absolute()}{after}"


def source_parts(name: str) -> tuple[str, str, str]:
    """The name of a data source in three parts: `multi:` or nothing, the source itself, and its options with the `?`."""
    before = "multi:" if name.startswith("multi:") else ""
    source, mark, options = name.removeprefix(before).partition("?")
    return before, source, mark + options


def url_problem(url: str) -> str | None:
    """The problem with a server's address, or None."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        fine = False
    if "@" in url:
        return "has a user name or password in it, which would be shown and stored: give a key in $OPENAI_API_KEY"
    return None if fine else f"{url!r} is no address of a server: use http://HOST:PORT/v1"


def _type_problem(spec: Any, hint: Any, value: Any) -> str | None:
    """What is wrong with a value's type or choice, or None; stored settings have not passed the parser of flags."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            fits = isinstance(value, str) and value in typing.get_args(option)
        elif option in (int, float):
            fits = isinstance(value, (int, option)) and not isinstance(value, bool)
        else:
            fits = isinstance(value, option)
        if fits:
            return None
    names = (", ".join(typing.get_args(o)) or getattr(o, "__name__", str(o)) for o in options)
    return f"{flag_of(spec.name)} must be {' or '.join(names).replace('NoneType', 'null')}, found {value!r:.80}"


def advice_problem(plan_to_worker: bool, worker_style: str) -> str | None:
    """What is wrong with showing a plan's text to a worker of some style, or None."""
    if plan_to_worker and worker_style == "few-shot":
        return "--plan-to-worker: the turns of --worker-style few-shot have no place for a plan: use instruct or worked"
    return None


def _problem_with(spec: Any, value: Any) -> str | None:
    """What is wrong with one number, or None."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    flag = flag_of(spec.name)
    found = f"found {value}"
    if isinstance(value, int) and abs(value) > _LARGEST:
        return f"{flag} is too large a number: at most {_LARGEST}"
    if not math.isfinite(value):
        return f"{flag} must be a finite number, {found}"
    if spec.metadata.get("positive") and value <= 0:
        return f"{flag} must be greater than 0, {found}"
    if spec.metadata.get("fraction") and not 0 <= value <= 1:
        return f"{flag} must lie between 0 and 1, {found}"
    below = spec.metadata.get("below")
    if below is not None and value >= below:
        return f"{flag} must be below {below}, {found}"
    minimum = spec.metadata.get("minimum")
    if minimum is not None and value < minimum:
        return f"{flag} must be at least {minimum}, {found}"
    return None
