"""Mutated inputs. For any answer, file or command line, the outcome must be a value or one clear line.

Everything runs in this process, through the functions to which the scripts pass such input. A finding is one of these:
an exception other than `UserError`, an empty line, more than `SECONDS` for one input, or a file written outside the
folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import UserError, UserErrors

from .stage import Stage

SECONDS = 60.0  # wall-clock limit for one input of at most 20,000 bytes; it is long because the cores are shared
LONGEST = 20_000
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**64, 10**400, 0.5, 1e308, -1e308, float("nan"), float("inf"), "", " ", "x", "0",
    "\x00", "\ud83d", "\u2028", "²", "٣", "ﬀ", "../../outside", "/etc/passwd", "~", "{{ 7 * 7 }}", "{% for x in y %}",
    "\x1b[2J", "a\nb", "x" * 3000, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [{}], "1e999", "9" * 5000, "true",
)  # fmt: skip
PIECES = (
    b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b"\r", b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"null", b"NaN",
    b"1e999", b"-", b"####", b"\\boxed{", b"<think>", b"</think>", b"```json", b"\\u0000", b"\\ud800", b"final_answer",
    b"the answer is ", b"%", b"$", b"1,000", "−".encode(), "½".encode(), b"--", b"=", b"'", b"9" * 400, b"[" * 900, b"{\"a\":" * 300,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A function that takes inputs.

    Attributes:
        name: for the counts.
        seeds: valid inputs, which are mutated.
        take: the function, called with one input.
        weight: how often it is chosen, relative to the other targets.
        json: whether inputs are also mutated as JSON values.
    """

    name: str
    seeds: tuple[bytes, ...]
    take: Callable[[bytes], object]
    weight: float = 1.0
    json: bool = True


def campaign(stage: Stage, only: str = "", inputs: int | None = None) -> None:
    """Mutate until the time is over, or until `inputs` were tried. `only` is searched in the names of targets."""
    from . import targets

    place = stage.folder / "input"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    told: set[str] = set()
    slowest: dict[str, float] = {}
    with targets.all_targets(stage, place) as chosen, written_outside(stage.folder) as outside:
        chosen = [target for target in chosen if re.search(only, target.name)]
        weights = [target.weight for target in chosen]
        while stage.time_left() and (inputs is None or stage.counts["inputs"] < inputs):
            for target in stage.dice.choices(chosen, weights, k=500):
                data = mutated(stage.dice, target)
                stage.counts["inputs"] += 1
                stage.counts[f"inputs: {target.name}"] += 1
                started = time.process_time()
                problem = outcome(target, data)
                slowest[target.name] = max(slowest.get(target.name, 0.0), time.process_time() - started)
                if problem is not None and (key := f"{target.name}: {problem.partition(' (')[0]}") not in told:
                    told.add(key)
                    sample = place / f"finding-{len(told)}"
                    sample.write_bytes(data)
                    stage.fails(f"{target.name}: {problem} (for {sample.name}: {data[:200]!r})")
                if outside:
                    stage.fails(f"{target.name}: wrote {outside.pop()} (for {data[:200]!r})")
    for name, seconds in sorted(slowest.items()):
        print(f"  slowest input of {name}: {seconds:.3f} s of CPU")


def outcome(target: Target, data: bytes) -> str | None:
    """What is wrong with the reaction to an input; None if nothing is."""
    printed = io.StringIO()
    try:
        with time_limit(), contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            target.take(data)
    except UserError as error:
        lines = str(error).split("\n")
        if not isinstance(error, UserErrors) and len(lines) != 1:
            return f"a message of {len(lines)} lines: {lines[0][:80]}…"
        return None if all(line.strip() for line in lines) else "an empty message"
    except SystemExit as error:  # raised by the command-line parser
        if error.code not in (0, 2):
            return f"exit code {error.code}"
        return None if "Traceback" not in printed.getvalue() else "a traceback"
    except Exception as error:  # noqa: BLE001  (this is what is looked for)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/common/" in frame.filename]
        last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} ({str(error)[:60]})"
    return None


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError if an input takes too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {SECONDS:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


_watching: list[tuple[str, list[str]]] = []


@contextlib.contextmanager
def written_outside(folder: Path) -> Iterator[list[str]]:
    """Collect the paths outside a folder that this process opens for writing, makes, moves or removes."""
    found: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not _watching or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link"):
            return
        if event == "open" and (not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        path = args[1] if event in ("os.rename", "os.symlink", "os.link") else args[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            name = os.path.realpath(os.fsdecode(path))
            root, list_ = _watching[-1]
            if not name.startswith((root, "/dev/null", "/proc/")):
                list_.append(f"{event} {name}")

    sys.addaudithook(hook)
    _watching.append((os.path.realpath(folder), found))
    yield found
    _watching.clear()


def mutated(dice: random.Random, target: Target) -> bytes:
    """A valid input, with one or more random changes."""
    data = dice.choice(target.seeds)
    if target.json and dice.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):
            lines = data.split(b"\n")
            place = dice.randrange(len(lines)) if len(lines) > 1 and dice.random() < 0.7 else None
            text = data if place is None else lines[place]
            value = json.loads(text)
            for _ in range(dice.choice((1, 1, 1, 2, 4))):
                value = changed(dice, value)
            new = dumped(value)
            data = new if place is None else b"\n".join([*lines[:place], new, *lines[place + 1 :]])
    for _ in range(dice.choice((0, 1, 1, 2, 4, 12)) if target.json else dice.choice((1, 1, 2, 4, 12))):
        data = byte_change(dice, data, target.seeds)
    return data[:LONGEST]


def changed(dice: random.Random, value: Any) -> Any:
    """A JSON value of which one part was replaced, left out, doubled or renamed."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        name = dice.choice(list(value))
        how = dice.random()
        if how < 0.1:
            return {key: item for key, item in value.items() if key != name}
        if how < 0.15:
            return {**{key: item for key, item in value.items() if key != name}, str(dice.choice(ODD)): value[name]}
        return {**value, name: changed(dice, value[name])}
    if isinstance(value, list) and value and dice.random() < 0.9:
        place = dice.randrange(len(value))
        how = dice.random()
        if how < 0.1:
            return value[:place] + value[place + 1 :]
        if how < 0.2:
            return [*value, value[place]]
        return [*value[:place], changed(dice, value[place]), *value[place + 1 :]]
    return dice.choice(ODD)


def dumped(value: Any) -> bytes:
    """A value as JSON. Half surrogate pairs, which UTF-8 cannot encode, are kept."""
    return json.dumps(value).encode()


def byte_change(dice: random.Random, data: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """Some bytes with one piece inserted, cut out, doubled, flipped or taken from another input."""
    place = dice.randrange(len(data) + 1)
    end = min(len(data), place + int(dice.expovariate(1 / 8)))
    how = dice.randrange(7)
    if how == 0:
        return data[:place] + dice.choice(PIECES) + data[place:]
    if how == 1:
        return data[:place] + data[end:]
    if how == 2:
        return data[:end] + data[place:end] * dice.choice((1, 3, 40)) + data[end:]
    if how == 3:
        return data[:place] + bytes(byte ^ 1 << dice.randrange(8) for byte in data[place:end]) + data[end:]
    if how == 4:
        other = dice.choice(seeds)
        start = dice.randrange(len(other) + 1)
        return data[:place] + other[start : start + 40] + data[end:]
    if how == 5:
        return data[:place]
    return data[:place] + dice.randbytes(dice.choice((1, 2, 8))) + data[end:]
