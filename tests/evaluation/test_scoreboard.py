"""The scoreboard: its statistics in small exact cases, and a run of ten questions on real models."""

from __future__ import annotations

import json
import math

import pytest
from conftest import run_script

from common.evaluation.scoreboard import (
    DIRECT,
    RECORDS,
    TRAINED,
    UNTRAINED,
    VOTE,
    Row,
    run_vote,
    save_scoreboard,
    stored_rows,
    summarise,
    votes_for,
    why_not_again,
)
from common.evaluation.statistics import mcnemar_exact, wilson_interval
from common.evaluation.table import TITLES, scoreboard_table
from common.generation import Generation
from common.models import load_tokenizer
from common.problems.questions import Question, load_questions
from common.reports.jsonl import append_jsonl, read_jsonl


def test_wilson_interval_by_hand():
    # n = 10, k = 5, z = 1.959964: centre (5 + z²/2) / (10 + z²), half width z·sqrt(k(n−k)/n + z²/4) / (n + z²)
    z = 1.959963984540054
    half = z * math.sqrt(5 * 5 / 10 + z * z / 4) / (10 + z * z)
    assert wilson_interval(5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-9)
    low, high = wilson_interval(0, 10)
    assert low == pytest.approx(0.0, abs=1e-12) and 0.25 < high < 0.31  # never a width of zero
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_mcnemar_by_hand():
    # 5 discordant, all for one side: 2 · (1/2)^5
    assert mcnemar_exact([True] * 5 + [True], [False] * 5 + [True]) == (5, 0, pytest.approx(2 / 32))
    # 1 against 3: 2 · (C(4,0) + C(4,1)) / 16
    left, right = [True, False, False, False], [False, True, True, True]
    assert mcnemar_exact(left, right) == (1, 3, pytest.approx(10 / 16))
    assert mcnemar_exact([True, False], [True, False]) == (0, 0, 1.0)


def row(name: str, correct: list[bool], tokens: int = 10) -> Row:
    records = [
        {
            "row": name, "question": f"q{n}", "gold": "1", "planner_output": "", "decomposed": n % 2 == 0,
            "invalid_plan": False, "subproblems": [str(n)], "subproblem_count": 1, "solutions": [], "final": "1",
            "answer": "1" if ok else "2", "correct": ok, "planner_tokens": 0, "worker_tokens": tokens,
            "finished": True, "worker_answers": 1, "worker_cut_off": n % 2, "total_tokens": tokens, "independence": 0.5, "error": None,
        }
        for n, ok in enumerate(correct)
    ]  # fmt: skip
    return Row(name, records, 1.0, {"worker": "w1", "grader": "g1"})


def test_files_hold_what_the_table_says(tmp_path):
    rows = [row(TRAINED, [True, True, True, False]), row(DIRECT, [False, False, True, False])]
    summary = save_scoreboard(rows, tmp_path)
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(stored["rows"]) == [DIRECT, TRAINED]
    assert stored["rows"][TRAINED]["accuracy"] == 0.75
    assert stored["paired"][DIRECT] == {"only_trained": 2, "only_other": 0, "p": 0.5}
    assert len((tmp_path / "evaluation.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    table = scoreboard_table(summary)
    assert "75.0%" in table and "5.0e-01" in table and max(map(len, table.splitlines())) <= 90
    assert "failed" not in table


def test_an_earlier_row_is_used_again_only_where_everything_agrees_and_nothing_failed(tmp_path):
    questions = [Question(f"q{n}", "#### 1") for n in range(4)]
    failed = row(TRAINED, [True, True, False, False])
    failed.records[3]["error"] = "planner: out of memory"
    save_scoreboard([row(DIRECT, [True, True, True, False]), failed], tmp_path)
    rows = stored_rows(tmp_path)
    same = {"grader": "g1", "worker": "w1"}
    assert list(rows) == [DIRECT, TRAINED] and why_not_again(rows[DIRECT], same, questions) is None
    assert why_not_again(rows[TRAINED], same, questions) == "with errors"
    assert why_not_again(rows[DIRECT], {**same, "grader": "g2"}, questions) == "made with other grader"
    assert why_not_again(rows[DIRECT], {**same, "adapter": "a"}, questions) == "made with other adapter"
    # An unknown fingerprint equals no other one, for example that of a model whose content cannot be read.
    assert why_not_again(rows[DIRECT], {**same, "worker": None}, questions) == "made with other worker"
    assert why_not_again(rows[DIRECT], same, questions[:3]) == "made of other questions"
    assert why_not_again(rows[DIRECT], same, [*questions, questions[0]]) is None, "what it lacks is added"
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    before = [{key: value for key, value in line.items() if key != "fingerprint"} for line in lines]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    assert stored_rows(tmp_path) == {}, "of an earlier version, which did not say what a row depends on"


def test_failures_are_told_and_left_out_of_the_averages():
    direct, trained = row(DIRECT, [True, True, True, False]), row(TRAINED, [True, True, True, False])
    for record, invalid in zip(trained.records, (None, None, False), strict=False):
        record |= {"correct": False, "error": "planner: no connection\nat all", "total_tokens": None}
        record["invalid_plan"] = invalid
    summary = summarise([direct, trained])
    found = summary["rows"][TRAINED]
    assert (found["errors"], found["planner_failures"], found["worker_failures"]) == (3, 2, 1)
    assert found["correct"] == 0 and found["total_tokens"] == 10 and found["invalid_plan_rate"] == 0
    table = scoreboard_table(summary)
    assert f"\n{TRAINED}: 2 of 4 questions failed without a plan, 1 while the worker solved them\n" in table
    assert "\n  the first: planner: no connection at all\n" in table
    (line,) = [line for line in table.splitlines() if line.startswith("failed, so wrong")]
    assert line.split()[-2:] == ["0", "3"] and max(map(len, table.splitlines())) <= 120
    for record in trained.records:
        record |= {"error": "x", "total_tokens": None, "planner_tokens": None, "worker_tokens": None}
    assert scoreboard_table(summarise([direct, trained])), "not one question that did not fail"


def test_a_vote_whose_samples_fail_is_an_error():
    questions = [Question("q0", "#### 1")]

    def sampler(requests):
        return [Generation("1", 10, True), *(Generation("", 0, False, "refused") for _ in requests[1:])]

    direct = row(DIRECT, [True])
    vote = run_vote(questions, direct, sampler, "few-shot", votes_for(math.nan, direct))
    (record,) = vote.records
    assert record["error"] == "refused" and not record["correct"] and record["total_tokens"] is None


def test_times_of_the_scoreboard_are_not_those_of_a_step(tiny_args):
    from common.evaluation.during_training import Scoring
    from common.training.grpo import build_trainer

    questions = load_questions(tiny_args.dataset, limit=10)
    tokenizer = load_tokenizer(tiny_args.base_model)
    trainer, executor = build_trainer(tiny_args, questions, tokenizer)
    scoring = Scoring(tiny_args, trainer.accelerator.unwrap_model(trainer.model), tokenizer, executor)
    scoring.before(questions)
    assert executor.embeddings.vectors(["something new"]), "there is an encoder, and it takes time"
    assert executor.embeddings.take_seconds() > 0
    scoring.before(questions)
    assert executor.embeddings.take_seconds() == 0 and executor.worker.take_stats().requests == 0


def test_the_vote_reaches_the_budget_and_the_greedy_answer_wins_ties():
    questions = [Question("q0", "#### 7"), Question("q1", "#### 7")]
    direct = row(DIRECT, [True, True])
    for record, answer in zip(direct.records, ("7", "3"), strict=True):
        record["answer"] = answer
    drawn = {"q0": iter(["8", "9"]), "q1": iter(["7", "7.0"])}
    asked: list[str] = []

    def sampler(requests):
        asked.extend(request[-1]["content"].split("\n")[0] for request in requests)
        return [Generation(next(drawn[request[-1]["content"].split("\n")[0]]), 10, True) for request in requests]

    vote = run_vote(questions, direct, sampler, "few-shot", votes_for(25, direct))
    assert asked == ["q0", "q0", "q1", "q1"]  # 10 tokens each: three answers reach 25
    assert [record["correct"] for record in vote.records] == [True, True]  # a tie of three, and 7 = 7.0
    assert vote.mean("total_tokens") == 30
    assert vote.name == VOTE


def test_cut_off_answers_and_answers_without_a_number_are_told(tmp_path):
    questions = [Question(f"q{n}", "#### 7") for n in range(4)]
    direct = row(DIRECT, [True, True, False, False])
    direct.records[3]["answer"] = None
    drawn = iter([("So 7 + 1", False), ("so 7", False), ("so 7", True)] + [("The answer is 7. So", False)] * 5)

    def sampler(requests):
        return [Generation(text, 10, finished) for _ in requests for text, finished in [next(drawn)]]

    vote = run_vote(questions, direct, sampler, "few-shot", votes_for(30, direct))
    # An answer that was cut off in its steps is no vote. One that was cut off after an explicit answer is a vote.
    assert [record["votes"] for record in vote.records] == [{"1": 1}, {"1": 1, "7": 2}, {"2": 1, "7": 2}, {"7": 2}]
    rows = save_scoreboard([direct, vote], tmp_path)["rows"]
    assert rows[DIRECT]["no_answer_rate"] == 1 / 4 and rows[VOTE]["no_answer_rate"] == 0
    assert rows[DIRECT]["worker_cut_off_rate"] == 2 / 4 and rows[VOTE]["worker_cut_off_rate"] == (2 + 7) / 12
    table = scoreboard_table({"questions": 4, "rows": rows, "paired": {}})
    lines = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    assert lines["no answer"][-2:] == ["25.0%", "0.0%"]
    assert lines["worker cut off"][-2:] == ["50.0%", "75.0%"]


def test_ten_questions_on_a_real_model_before_after_and_again(tiny_args, tmp_path):
    from conftest import flags

    tiny_args.dataset = "generated:shares?people=3"
    tiny_args.max_samples = 20
    tiny_args.eval_samples = 10
    tiny_args.max_steps = 1
    done = run_script("grpo_training.py", *flags(tiny_args))
    assert done.returncode == 0, done.stderr
    assert "none of them is among the 20 training questions" in done.stderr
    folder = tmp_path / "run"
    first = json.loads((folder / "evaluation.json").read_text())
    assert first["questions"] == 10
    assert list(first["rows"]) == [DIRECT, VOTE, UNTRAINED, TRAINED]
    assert set(first["paired"]) == {DIRECT, VOTE, UNTRAINED}
    assert first["rows"][VOTE]["total_tokens"] >= first["rows"][TRAINED]["total_tokens"] * 0.9
    for name in first["rows"]:
        assert TITLES[name] in done.stdout
    # A scoreboard was stopped in its first row: that row's questions and an earlier row of votes are used again.
    records = read_jsonl(folder / "evaluation.jsonl")
    (folder / "evaluation.jsonl").unlink()
    for record in [*records[:4], *(record for record in records if record["row"] == VOTE)]:
        append_jsonl(folder / "evaluation.jsonl", {**record, "seconds": 12345})
    done = run_script("grpo_training.py", "--output-dir", str(folder), "--eval-only", "--eval-samples", "10")
    assert done.returncode == 0, done.stderr
    assert "direct: the first 4 questions as in evaluation.jsonl" in done.stderr
    assert "votes: as in evaluation.jsonl" in done.stderr
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["rows"][DIRECT]["seconds"] > again["rows"][VOTE]["seconds"] == 12345
    assert again["rows"][UNTRAINED]["seconds"] < 12345 and len(read_jsonl(folder / "evaluation.jsonl")) == 4 * 10
    for name, values in first["rows"].items():
        assert {k: v for k, v in values.items() if k != "seconds"} == {
            k: v for k, v in again["rows"][name].items() if k != "seconds"
        }, name
    # A new run in the same folder uses none of the old rows.
    tiny_args.worker_max_tokens = 4
    tiny_args.eval_samples = 3
    done = run_script("grpo_training.py", *flags(tiny_args), "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "evaluation.jsonl" not in done.stderr and "earlier row" not in done.stderr
    assert len(read_jsonl(folder / "evaluation.jsonl")) == 4 * 3


def test_votes_that_an_earlier_version_stored_under_another_name_are_used_again(tmp_path):
    row = {"row": "direct, equal tokens", "question": "q", "error": None, "seconds": 1.0, "fingerprint": {"votes": "x"}}
    (tmp_path / RECORDS).write_text(json.dumps(row) + "\n")
    rows = stored_rows(tmp_path)
    assert list(rows) == [VOTE] == ["votes"] and rows[VOTE].records[0]["row"] == VOTE
