"""Aligned text tables for the terminal. Nothing heavy is imported here."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

from common.reports.jsonl import is_number

# Cells that count as numbers: "41.2%", "0.41 ± 0.05", "+3", "12/48", "[0.10, 0.32]", "1e-05", "-".
_LOOKS_NUMERIC = re.compile(r"[-+−±~<>=≤≥]?\s*[\[(]?[-+−±]?\d[\d.,eE\s%±+\-−–/\[\]()x×]*")
_MISSING = "-"


def format_table(
    rows: Sequence[Mapping[str, object]] | Sequence[Sequence[object]],
    headers: Sequence[str] | None = None,
    *,
    max_width: int = 60,
) -> str:
    """An aligned plain-text table: a header line, a rule, and one line per row. Columns of numbers align right.

    All floats of a column get the same number of decimals. None and NaN are shown as "-".

    Args:
        rows: dicts (columns in order of first appearance, or those in `headers`), or sequences.
        headers: names of the columns; required if rows are sequences.
        max_width: longer text is cut to this many characters; line breaks are removed.

    Raises:
        ValueError: if a sequence does not have one cell per header.
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
    if 0 < largest < 0.001:  # such as learning rates
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
    """Replace line breaks by spaces and remove control characters: model text may contain escape sequences."""
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
