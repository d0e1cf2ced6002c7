"""Reports that need no server: JSON lines and tables for the terminal (pictures: `common.plots`).

Only the standard library is imported here.

    append_jsonl(path, record)            one line per training step, safe to be killed in the middle
    read_jsonl(path)                      back again; a torn last line is dropped
    truncate_jsonl_after(path, step)      before a resumed run writes steps that the file already has
    format_table(rows, headers)           aligned text for the terminal
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError

__all__ = [
    "JsonLinesError",
    "append_jsonl",
    "format_table",
    "read_jsonl",
    "truncate_jsonl_after",
]


# --------------------------------------------------------------------------------------------- JSON lines


class JsonLinesError(UserError, ValueError):
    """A JSON-lines file that cannot be read; the message names the file and the line."""


def append_jsonl(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Add one record as one line and flush it, so that a killed run keeps every finished line.

    NaN and infinities become null (they are not JSON), non-ASCII text stays readable, and half a
    surrogate pair (models do emit them) is written as its \\uXXXX escape and reads back unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_json_ready(record), ensure_ascii=False, allow_nan=False)
    # A lone surrogate can only sit inside a JSON string, where "\ud800" is exactly its JSON escape.
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    with path.open("a+b") as file:
        _mend_tail(file)
        file.write(line)
        file.flush()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every record of a JSON-lines file, without the last line if a kill tore it.

    A broken line anywhere else raises JsonLinesError with its number: it means that the file is
    not what it should be, and skipping it would hide that.
    """
    return [record for _, record in _parsed_lines(Path(path))]


def truncate_jsonl_after(path: str | os.PathLike[str], step: int) -> int:
    """Keep only records with `record["step"] <= step`; return how many lines went.

    Call it when a run resumes from a checkpoint: the steps after that checkpoint will be written
    again. Atomic, so a kill leaves the old file or the new one. A missing file is no error.
    """
    path = Path(path)
    if not path.exists():
        return 0
    parsed = _parsed_lines(path)
    lines_before = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    kept = [raw for raw, record in parsed if is_number(record.get("step")) and record["step"] <= step]
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
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
    # Split bytes on "\n" only: str.splitlines would also cut at U+2028, which may stand in a string.
    numbered = [(number, raw) for number, raw in enumerate(content.split(b"\n"), start=1) if raw.strip()]
    records = []
    for number, raw in numbered:
        try:
            record = json.loads(raw.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {type(record).__name__}")
        except (ValueError, RecursionError) as error:
            if number == numbered[-1][0]:
                break  # torn: the run was killed while it wrote this line
            raise JsonLinesError(f"{path}, line {number}: not a JSON object ({error})") from error
        records.append((raw, record))
    return records


def _mend_tail(file: Any) -> None:
    """Give a complete last line its missing newline; cut off a torn one, or the next would join it."""
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
    """`value` in types JSON has; what it cannot hold becomes null (NaN, inf) or text."""
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


def temporary_beside(path: Path) -> Path:
    # In the same directory, because os.replace is atomic only within one file system.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------ tables for terminals

# "41.2%", "0.41 ± 0.05", "+3", "12/48", "[0.10, 0.32]", "1e-05", "-": cells that read as numbers.
_LOOKS_NUMERIC = re.compile(r"[-+−±~<>=≤≥]?\s*[\[(]?[-+−±]?\d[\d.,eE\s%±+\-−–/\[\]()x×]*")
_MISSING = "-"


def format_table(
    rows: Sequence[Mapping[str, object]] | Sequence[Sequence[object]],
    headers: Sequence[str] | None = None,
    *,
    max_width: int = 60,
) -> str:
    """An aligned plain-text table: a header, a rule, a line per row; columns of numbers to the right.

    Rows are dicts (columns in order of first appearance, or those named by `headers`) or sequences
    (`headers` then names the columns). Floats of one column share their decimals; None and NaN
    show as "-"; long text is cut to `max_width` characters and kept to one line.
    """
    names: list[str]
    cells: list[list[object]]
    mappings = [row for row in rows if isinstance(row, Mapping)]
    if mappings:
        names = list(headers) if headers else list(dict.fromkeys(str(key) for row in mappings for key in row))
        cells = [[row.get(name) for name in names] for row in mappings]
    else:
        names = list(headers or [])
        cells = [list(row) for row in rows]
        if any(len(row) != len(names) for row in cells):
            raise ValueError(f"every row needs {len(names)} cells, one per header")
    if not names:
        return ""

    columns = []
    for index, name in enumerate(names):
        values = [row[index] for row in cells]
        texts = [_clip(text, max_width) for text in _column_texts(values)]
        to_the_right = bool(values) and all(
            is_number(value) or text == _MISSING or _LOOKS_NUMERIC.fullmatch(text)
            for value, text in zip(values, texts, strict=True)
        )
        head = _clip(_one_line(name), max_width)
        width = max(map(_display_width, [head, *texts]))
        columns.append([_pad(text, width, to_the_right) for text in [head, "─" * width, *texts]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _column_texts(values: list[object]) -> list[str]:
    floats = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v)]
    largest = max(floats, default=0.0)
    style = ",.1f" if largest >= 100 else ".3f"
    if 0 < largest < 0.001:  # learning rates
        style = ".1e"
    texts = []
    for value in values:
        if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
            texts.append(_MISSING)
        elif isinstance(value, bool):
            texts.append("yes" if value else "no")
        elif isinstance(value, int):
            texts.append(f"{value:,}" if abs(value) >= 10_000 else str(value))
        elif isinstance(value, float):
            texts.append(format(value, style))
        else:
            texts.append(_one_line(str(value)))
    return texts


def _one_line(text: str) -> str:
    """Spaces for line breaks, nothing for control characters: model text may hold escape sequences."""
    text = " ".join(text.split())
    return "".join(char for char in text if unicodedata.category(char) not in {"Cc", "Cf", "Cs"})


def _display_width(text: str) -> int:
    width = 0
    for char in text:
        if not unicodedata.combining(char):
            width += 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return width


def _clip(text: str, width: int) -> str:
    if _display_width(text) <= width:
        return text
    while text and _display_width(text) > width - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def _pad(text: str, width: int, to_the_right: bool) -> str:
    space = " " * (width - _display_width(text))
    return space + text if to_the_right else text + space
