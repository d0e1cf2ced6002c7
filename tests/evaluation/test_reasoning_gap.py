"""Composed questions on the scoreboard: figures computed by hand, and two steps of a real run."""

from __future__ import annotations

import json
from itertools import product

import pytest
from conftest import flags, run_script

from common.evaluation.composed import expected_accuracy, reasoning_gap
from common.evaluation.scoreboard import DIRECT, PARTS, TRAINED, UNTRAINED, VOTE, Row, save_scoreboard, summarise
from common.evaluation.table import scoreboard_table
from common.reports.jsonl import read_jsonl


def record(row: str, number: int, correct: bool, problems: int, decomposed: bool | None, invalid: bool | None = False):
    return {
        "row": row, "question": f"q{number}", "gold": "1", "planner_output": "", "decomposed": decomposed,
        "invalid_plan": invalid, "plan_contains_answer": False, "subproblems": ["a"], "subproblem_count": 1,
        "solutions": [], "final": "1", "answer": "1", "correct": correct, "planner_tokens": 0, "worker_tokens": 9,
        "finished": True, "worker_answers": 1, "worker_cut_off": 0, "total_tokens": 9 * problems, "independence": 0.5,
        "error": None, "problems": problems,
    }  # fmt: skip


def board() -> list[Row]:
    """Four questions of two problems, two of three problems, and four single questions."""
    counts = [2, 2, 2, 2, 3, 3, 1, 1, 1, 1]
    direct = [True, False, False, False, False, False, True, True, False, False]
    trained = [True, True, True, False, True, False, True, True, False, False]
    split = [True, True, True, False, True, None, False, False, True, False]
    rows = [
        Row(DIRECT, [record(DIRECT, n, ok, count, False) for n, (ok, count) in enumerate(zip(direct, counts, strict=True))], 1.0),
        Row(
            TRAINED,
            [record(TRAINED, n, ok, count, bool(did), did is None or n == 9) for n, (ok, count, did) in enumerate(zip(trained, counts, split, strict=True))],
            1.0,
        ),
    ]  # fmt: skip
    alone = [True, True, True, False, True, True, False, True, True, True, False, True, True, True]
    rows.append(Row(PARTS, [record(PARTS, n, ok, 1, False) for n, ok in enumerate(alone)], 1.0))
    return rows


def test_the_gap_and_the_decisions_by_hand(tmp_path):
    summary = save_scoreboard(board(), tmp_path)
    assert list(summary["rows"]) == [DIRECT, TRAINED] and set(summary["paired"]) == {DIRECT}
    assert summary["questions"] == 10, "the problems alone are no row of it"
    apart = json.loads((tmp_path / "evaluation.json").read_text())["composed"]
    assert (apart["composed"], apart["single"]) == (6, 4)
    first, second, third = 5 / 6, 5 / 6, 1 / 2
    assert apart["parts_alone"]["accuracy_by_place"] == pytest.approx([first, second, third])
    expected = (4 * first * second + 2 * first * second * third) / 6
    assert apart["parts_alone"]["expected"] == pytest.approx(expected)
    direct, trained = apart["rows"][DIRECT], apart["rows"][TRAINED]
    assert direct["composed"]["accuracy"] == pytest.approx(1 / 6) and direct["single"]["accuracy"] == 0.5
    assert direct["gap"]["gap"] == pytest.approx(1 / 6 - expected)
    assert trained["gap"]["gap"] == pytest.approx(4 / 6 - expected)
    assert trained["composed"]["total_tokens"] == (4 * 18 + 2 * 27) / 6
    assert apart["gap_closed"] == pytest.approx(1 - (4 / 6 - expected) / (1 / 6 - expected))
    assert apart["paired"][DIRECT]["composed"] == {"only_trained": 3, "only_other": 0, "p": 0.25}
    assert apart["paired"][DIRECT]["single"]["p"] == 1.0
    # Four of six composed questions were split. Of the four single ones, one was split, and one has no valid plan.
    assert trained["composed_split"] == 4 / 6 and trained["single_left_whole"] == 2 / 4
    assert trained["right_decisions"] == 6 / 10 and "composed_split" not in direct
    table = scoreboard_table(summary)
    assert max(map(len, table.splitlines())) <= 90
    for text in (
        "reasoning gap",
        "-41.2%",
        "right decisions",
        "60.0%",
        "the reasoning gap is the accuracy minus that",
        "trained closes 121%",
    ):
        assert text in table, f"{text} is not in\n{table}"
    rows = [Row(name, board()[1].records, 1.0) for name in (DIRECT, VOTE, UNTRAINED, "supervised planner", TRAINED)]
    assert max(map(len, scoreboard_table(summarise([*rows, board()[2]])).splitlines())) <= 90


def test_a_scoreboard_without_composed_questions_is_as_before():
    rows = board()[:2]
    for row in rows:
        row.records = row.records[6:]
    summary = summarise(rows)
    assert "composed" not in summary and "gap" not in scoreboard_table(summary)
    for row in rows:
        for each in row.records:
            del each["problems"], each["plan_contains_answer"]
    assert "composed" not in summarise(rows), "of an earlier version, which did not write them"


def test_the_gaps_interval_is_the_same_again_and_covers_no_gap_where_there_is_none():
    parts = [list(pair) for pair in product([True, False], repeat=2)] * 25
    none = reasoning_gap([all(pair) for pair in parts], parts)
    assert none == reasoning_gap([all(pair) for pair in parts], parts)
    assert none["gap"] == pytest.approx(0) and none["interval_95"][0] < 0 < none["interval_95"][1]
    low, high = reasoning_gap([False] * 100, parts)["interval_95"]
    assert low < -0.25 < high < 0, "a quarter could be expected"
    assert expected_accuracy([[True], [True, False]]) == 0.5


def test_two_steps_on_composed_questions_keep_score_of_them_apart(tiny_args, tmp_path):
    tiny_args.dataset = "multi:generated:shares?people=2&parts=2-3&single=0.4"
    tiny_args.max_samples, tiny_args.eval_samples, tiny_args.max_steps = 12, 10, 2
    tiny_args.worker_style, tiny_args.worker_context, tiny_args.plan_to_worker = "worked", "none", True
    tiny_args.batch_size, tiny_args.grad_accum = 4, 1
    done = run_script("grpo_training.py", *flags(tiny_args))
    assert done.returncode == 0, done.stderr
    assert "questions, " in done.stderr and "none of them is among the 12 training questions" in done.stderr
    folder = tmp_path / "run"
    apart = json.loads((folder / "evaluation.json").read_text())["composed"]
    assert apart["composed"] + apart["single"] == 10 and apart["composed"] > 2 and apart["single"] > 0
    assert set(apart["rows"]) == {DIRECT, VOTE, UNTRAINED, TRAINED}
    records = read_jsonl(folder / "evaluation.jsonl")
    alone = [each for each in records if each["row"] == PARTS]
    assert len(alone) == sum(each["problems"] for each in records if each["row"] == DIRECT and each["problems"] > 1)
    assert all("(A)" not in each["question"] for each in alone)
    assert 0 <= apart["parts_alone"]["expected"] <= 1
    samples = read_jsonl(folder / "samples.jsonl")
    assert len(samples) == 8 and any("(A) " in sample["question"] for sample in samples)
    settings = json.loads((folder / "training_config.json").read_text())["settings"]
    assert settings["worker_context"] == "none" and settings["plan_to_worker"] is True
    again = run_script("grpo_training.py", "--output-dir", str(folder), "--eval-only", "--eval-samples", "10")
    assert again.returncode == 0, again.stderr
    assert "parts alone: as in evaluation.jsonl" in again.stderr and "composed: accuracy" in again.stdout
