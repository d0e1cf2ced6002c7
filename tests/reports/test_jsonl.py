"""JSON Lines files stay readable after a kill."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from common.errors import UserError
from common.reports.jsonl import append_jsonl, read_jsonl, truncate_jsonl_after


def test_a_record_reads_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "er" / "x.jsonl"  # directories appear as needed
    records = [
        {"step": 1, "text": "naïve 日本 😀 line\nbreak \u2028 \x00"},
        {"step": 2, "nested": {"list": [1, 2.5, True, None], "empty": {}}},
    ]
    for record in records:
        append_jsonl(path, record)
    assert read_jsonl(path) == records
    assert path.read_bytes().count(b"\n") == 2
    assert "日本" in path.read_text(encoding="utf-8")


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "x.jsonl"
    append_jsonl(path, {"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf}, "e": np.float32("nan")})
    assert read_jsonl(path) == [{"a": None, "b": [None, 1.0], "c": {"d": None}, "e": None}]
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_types_that_json_lacks_are_written_all_the_same(tmp_path):
    path = tmp_path / "x.jsonl"
    append_jsonl(path, {"p": Path("/a"), "n": np.float32(0.5), "i": np.int64(3), "a": np.arange(2), "s": {7}, 1: (2,)})
    assert read_jsonl(path) == [{"p": "/a", "n": 0.5, "i": 3, "a": [0, 1], "s": [7], "1": [2]}]


def test_half_a_surrogate_pair_reads_back(tmp_path):
    path = tmp_path / "x.jsonl"
    record = {"text": "torn \ud83d emoji \udc00", "\udfff": 1}
    append_jsonl(path, record)
    assert read_jsonl(path) == [record]
    path.read_bytes().decode("utf-8")  # and the file is still UTF-8


@pytest.mark.parametrize("torn", ['{"step": 3, "te', "{", '{"step": 3, "t": "é'.encode()[:-1], b"\x00\x00\x00", "42"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + (torn if isinstance(torn, bytes) else torn.encode()))
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]


@pytest.mark.parametrize("broken", ['{"step": 2, "te', "[1]", "7", "not json"])
def test_a_broken_line_elsewhere_is_an_error_with_its_number(tmp_path, broken):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n\n' + broken + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 3") as caught:
        read_jsonl(path)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_missing_or_empty_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert read_jsonl(tmp_path / "empty.jsonl") == []


def test_appending_after_a_kill_does_not_glue_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "te')
    append_jsonl(path, {"step": 2})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]
    # a last line that lacks only its newline is complete: it stays
    path.write_text('{"step": 1}\n' + json.dumps({"step": 2, "text": "x" * 200_000}))
    append_jsonl(path, {"step": 3})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3]
    # and an incomplete line longer than the block that is read back
    path.write_text('{"step": 1}\n{"text": "' + "x" * 200_000)
    append_jsonl(path, {"step": 2})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]


def test_every_line_before_a_kill_is_on_disk(tmp_path):
    path = tmp_path / "x.jsonl"
    code = (
        "import itertools, sys\nfrom common.reports.jsonl import append_jsonl\n"
        "for step in itertools.count(1):\n"
        "    append_jsonl(sys.argv[1], {'step': step, 'text': 'é' * 3000})\n    print(step, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 20:
            break
    child.kill()
    reported = [20] + [int(line) for line in child.stdout.read().split("\n") if line.isdigit()]
    child.wait()
    child.stdout.close()
    assert len(read_jsonl(path)) >= max(reported)


def test_resume_cuts_the_steps_after_the_checkpoint(tmp_path):
    path = tmp_path / "x.jsonl"
    for step in range(1, 11):
        append_jsonl(path, {"step": step, "text": "é\u2028"})
    kept = path.read_bytes().split(b"\n")[:6]
    with path.open("a") as file:
        file.write('{"step": 11, "to')
    assert truncate_jsonl_after(path, 6) == 5  # four steps and the incomplete line
    assert path.read_bytes() == b"\n".join(kept) + b"\n"  # kept lines do not change
    assert truncate_jsonl_after(path, 6) == 0
    assert truncate_jsonl_after(path, 0) == 6
    assert read_jsonl(path) == []
    assert truncate_jsonl_after(tmp_path / "none.jsonl", 3) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]  # no temporary file left


def test_resume_does_not_touch_a_file_it_cannot_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        truncate_jsonl_after(path, 1)
    assert path.read_text() == '{"step": 1}\nbroken\n{"step": 3}\n'
