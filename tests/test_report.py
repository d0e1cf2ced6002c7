"""Reports: files survive kills and odd values, pictures are drawn, tables keep their shape."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import png_size

from common.errors import UserError
from common.plots import plot_training_curves
from common.report import append_jsonl, format_table, read_jsonl, truncate_jsonl_after

ROOT = Path(__file__).resolve().parents[1]


# --------------------------------------------------------------------------------------------- JSON lines


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
    # and a torn line longer than the block that is read back
    path.write_text('{"step": 1}\n{"text": "' + "x" * 200_000)
    append_jsonl(path, {"step": 2})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]


def test_every_line_before_a_kill_is_on_disk(tmp_path):
    path = tmp_path / "x.jsonl"
    code = (
        "import itertools, sys\nfrom common.report import append_jsonl\n"
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
    assert truncate_jsonl_after(path, 6) == 5  # four steps and the torn line
    assert path.read_bytes() == b"\n".join(kept) + b"\n"  # kept lines are kept to the byte
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


# -------------------------------------------------------------------------------------------- the picture


def synthetic_step(step, rng):
    correct = min(1.0, 0.1 + step / 500 + rng.random() / 5)
    return {
        "step": step,
        "reward": correct + 0.3,
        "reward_std": 0.2,
        "correctness": correct,
        "token_efficiency": 0.6,
        "independence": None if step % 3 else 0.5,
        "decomposition_rate": rng.random(),
        "invalid_plan_rate": 0.0,
        "distinct_plans": 1.0,
        "planner_tokens": 80.0 + step,
        "worker_tokens": 300.0,
    }


@pytest.mark.parametrize("steps", [0, 1, 2, 12, 31, 300])
def test_curves_for_any_number_of_steps(tmp_path, steps):
    rng = random.Random(0)
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "plots" / "curves.png"
    metrics.touch()
    for step in range(1, steps + 1):
        append_jsonl(metrics, synthetic_step(step, rng))
    plot_training_curves(metrics, picture, title="costs $5_x or $6^y {a}")
    width, height = png_size(picture)
    assert width > 1000 and height > 600
    assert picture.stat().st_size > 20_000
    assert [p.name for p in picture.parent.iterdir()] == ["curves.png"]


def test_curves_with_missing_keys_gaps_and_a_torn_line(tmp_path):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    append_jsonl(metrics, {"step": 5, "reward": 0.5, "loss": 0.1})
    append_jsonl(metrics, {"step": 10, "reward": None, "reward_std": 0.1, "correctness": math.nan})
    append_jsonl(metrics, {"step": 10, "reward": 0.7, "reward_std": 0.1})  # a step logged twice: the last counts
    append_jsonl(metrics, {"step": 15, "correctness": 1, "planner_tokens": 0})
    with metrics.open("a") as file:
        file.write('{"step": 20, "rew')
    plot_training_curves(metrics, picture)
    png_size(picture)
    only_loss = tmp_path / "loss.jsonl"
    append_jsonl(only_loss, {"step": 1, "loss": 2.0})
    plot_training_curves(only_loss, picture)
    png_size(picture)


def test_drawing_leaves_no_state_behind(tmp_path):
    """No pyplot: its figures would pile up over a long run, and its backend may want a display."""
    code = (
        "import sys\nfrom common import plots, report\nassert 'matplotlib' not in sys.modules\n"
        "report.append_jsonl(sys.argv[1] + '/m.jsonl', {'step': 1, 'reward': 0.5})\n"
        "plots.plot_training_curves(sys.argv[1] + '/m.jsonl', sys.argv[1] + '/c.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=60)


# ----------------------------------------------------------------------------------------------- the table


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
    assert "日本  yes" in lines[2] and "abcd  no" in lines[3]  # two columns of a terminal each
