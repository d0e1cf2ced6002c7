"""Tables for the terminal."""

from __future__ import annotations

import math

import pytest

from common.reports.tables import format_table


def test_table_aligns_numbers_to_the_right():
    table = format_table(
        [
            {"system": "direct", "correct": "41.2%", "n": 48, "tokens": 123.44, "p": None},
            {"system": "trained", "correct": "3.0%", "n": 1319, "tokens": 1023.4, "p": 0.0312},
        ]
    )
    assert table.splitlines() == [
        "system   correct     n   tokens      p",
        "───────  ───────  ────  ───────  ─────",
        "direct     41.2%    48    123.4      -",
        "trained     3.0%  1319  1,023.4  0.031",
    ]


def test_table_of_plain_rows_and_chosen_columns():
    assert format_table([["a", 1], ["bb", 22]], ["name", "value"]).splitlines()[2:] == ["a         1", "bb       22"]
    assert "hidden" not in format_table([{"a": 1, "hidden": 2}], ["a"])
    assert format_table([]) == ""
    assert format_table([], ["a", "b"]).splitlines()[0] == "a  b"
    with pytest.raises(ValueError, match="2 cells"):
        format_table([["a"]], ["x", "y"])


def test_table_survives_model_text():
    row = {"text": "two\nlines\t\x1b[31mred\x1b[0m \ud83d " + "x" * 100, "wide": "日本", "flag": True, "nan": math.nan}
    lines = format_table([row, {"text": "short", "wide": "abcd", "flag": False, "nan": 1.0}], max_width=30).splitlines()
    assert len(lines) == 4 and "\x1b" not in "".join(lines) and "…" in lines[2]
    "".join(lines).encode("utf-8")
    assert "日本  yes" in lines[2] and "abcd  no" in lines[3]  # each character is two terminal columns wide
