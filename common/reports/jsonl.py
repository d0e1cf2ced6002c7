"""JSON Lines files: one record per line, readable even after the process was killed while writing one.

append_jsonl(path, record)            adds one line, usually one per training step
read_jsonl(path)                      reads all lines; an incomplete last line is dropped
truncate_jsonl_after(path, step)      before a resumed run writes steps that the file already has

Nothing heavy is imported here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from common.errors import UserError
from common.runs.files import naming, temporary_beside


class JsonLinesError(UserError, ValueError):
    """A JSON-lines file that cannot be read; the message names the file and the line."""


def append_jsonl(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Append one record as one line and flush it, so that a killed run keeps every finished line.

    NaN and infinities become null, because they are not JSON. Non-ASCII text stays readable. Half of a surrogate
    pair, which models sometimes emit, is written as its \\uXXXX escape and is read back unchanged.

    Args:
        path: the file; it is created if missing.
        record: values that JSON has, or numpy and torch scalars and arrays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_json_ready(record), ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair can only be inside a JSON string, where "\ud800" is its JSON escape.
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    with naming(path), path.open("a+b") as file:
        _mend_tail(file)
        file.write(line)
        file.flush()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a JSON Lines file, without an incomplete last line that a kill left.

    Raises:
        JsonLinesError: for any other broken line, with its number. Skipping it would hide that the file is not what
            it should be.
    """
    return [record for _, record in _parsed_lines(Path(path))]


def truncate_jsonl_after(path: str | os.PathLike[str], step: int) -> int:
    """Keep only records with `record["step"] <= step`; returns the number of removed lines.

    Call it when a run resumes from a checkpoint: the later steps will be written again. The file is replaced in one
    move, so after a kill it is the old or the new one. A missing file is no error.

    Raises:
        JsonLinesError: if the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return 0
    parsed = _parsed_lines(path)
    lines_before = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    kept = [raw for raw, record in parsed if is_number(record.get("step")) and record["step"] <= step]
    temporary = temporary_beside(path)
    try:
        with naming(path), temporary.open("wb") as file:
            file.writelines(raw + b"\n" for raw in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return lines_before - len(kept)


def _parsed_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JsonLinesError(f"{path}: cannot be read: {error.strerror or error}") from error
    # Split at "\n" bytes only: str.splitlines would also split at U+2028, which is allowed in a JSON string.
    numbered = [(number, raw) for number, raw in enumerate(content.split(b"\n"), start=1) if raw.strip()]
    records = []
    for number, raw in numbered:
        try:
            record = json.loads(raw.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {type(record).__name__}")
        except (ValueError, RecursionError) as error:
            if number == numbered[-1][0]:
                break  # incomplete: the run was killed while it wrote this line
            raise JsonLinesError(f"{path}, line {number}: not a JSON object ({error})") from error
        records.append((raw, record))
    return records


def _mend_tail(file: Any) -> None:
    """Complete the last line of the file, so that the next record does not join it.

    A complete record gets its missing newline; an incomplete one is cut off.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    tail, position = b"", size
    while position > 0 and b"\n" not in tail:
        start = max(0, position - 65536)
        file.seek(start)
        tail, position = file.read(position - start) + tail, start
    fragment = tail.rpartition(b"\n")[2]
    try:
        json.loads(fragment.decode("utf-8"))
        file.write(b"\n")  # append mode: always written at the end
    except (ValueError, RecursionError):
        file.truncate(size - len(fragment))


def _json_ready(value: Any) -> Any:
    """`value` in types that JSON has. Other values become null (NaN, infinity) or text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_json_ready(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return _json_ready(value.tolist())
    return str(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value read from JSON is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that can be drawn: neither infinite nor not a number."""
    return is_number(value) and math.isfinite(value)
