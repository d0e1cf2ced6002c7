"""The scoreboard: does planning help, compared with direct solving and with untrained planners?

All rows use the same questions, worker and executor; only the planner differs. In every row, a question with an
invalid plan is solved directly, as when the planner is served.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from common.evaluation.composed import summarise_composed
from common.evaluation.fingerprint import Fingerprint, difference
from common.evaluation.statistics import mcnemar_exact, wilson_interval
from common.generation import Generation
from common.grading import extract_prediction, parse_gold
from common.pipeline import PipelineExecutor, PipelineItem, PipelineResult
from common.plans import Plan
from common.problems.questions import Question
from common.prompts import Message, direct_messages, planner_messages
from common.reports.jsonl import JsonLinesError, read_jsonl
from common.reports.plots import plot_scoreboard
from common.runs.files import write_json, write_text_atomically

Answerer = Callable[[Sequence[Sequence[Message]]], list[Generation]]

DIRECT, VOTE, UNTRAINED, SUPERVISED, TRAINED = (
    "direct",
    "votes",
    "untrained planner",
    "supervised planner",
    "trained planner",
)
EARLIER_NAMES = {"direct, equal tokens": VOTE}  # of rows that earlier versions stored
ORDER = (DIRECT, VOTE, UNTRAINED, SUPERVISED, TRAINED)
PARTS = "parts alone"  # not part of the comparison: the problems of composed questions, solved one by one
RECORDS = "evaluation.jsonl"
VOTE_TEMPERATURE = 0.7  # of the samples in a majority vote, as in the self-consistency paper (arXiv:2203.11171)
MIN_VOTES = 3  # see `votes_for`


@dataclass(slots=True)
class Row:
    """One row of the scoreboard.

    A question that failed has an `error`. It counts as wrong. All averages except the accuracy leave it out.

    Attributes:
        name: of the row.
        records: one per question, in the order of the questions.
        seconds: time that the row took.
        fingerprint: everything that determines the content of the row.
    """

    name: str
    records: list[dict[str, Any]]
    seconds: float
    fingerprint: Fingerprint = field(default_factory=dict)

    def mean(self, key: str) -> float:
        """Mean of a field over the questions that have it; nan if none has."""
        values = [record[key] for record in self.records if record.get(key) is not None]
        return sum(values) / len(values) if values else math.nan

    def part(self, questions: slice) -> Row:
        """The row, reduced to some of its questions."""
        return Row(self.name, self.records[questions], self.seconds, self.fingerprint)


def parts_of(questions: Sequence[Question]) -> list[Question]:
    """The problems of all composed questions, in order."""
    return [part for item in questions for part in item.parts]


def run_direct(questions: Sequence[Question], executor: PipelineExecutor, name: str = DIRECT) -> Row:
    """The row of direct solving: the worker alone, step by step, greedy. `name` is for a row of other questions."""
    plan = Plan(False, ()).to_json()
    return _run(name, questions, executor, [Generation(plan, 0, True) for _ in questions])


def run_planner(
    name: str, questions: Sequence[Question], executor: PipelineExecutor, planner: Answerer, style: str
) -> Row:
    """The row of a planner.

    Args:
        name: of the row.
        questions: of the scoreboard.
        executor: carries out the plans.
        planner: answers the planner's prompts, greedily.
        style: of these prompts.
    """
    started = time.perf_counter()
    context = executor.worker.context
    plans = planner([planner_messages(item.question, style, context) for item in questions])
    return _run(name, questions, executor, plans, started)


def run_vote(questions: Sequence[Question], direct: Row, sampler: Answerer, style: str, count: int) -> Row:
    """The row of direct solving with a majority vote over samples (self-consistency, arXiv:2203.11171).

    The greedy answer is the first vote and wins ties.

    Args:
        questions: of the scoreboard, or a part of them.
        direct: row of the same questions, whose greedy answers are the first votes.
        sampler: answers the worker's direct prompts by sampling.
        style: of these prompts.
        count: votes per question, including the greedy answer; see `votes_for`.

    Returns:
        The row. Its time is that of the samples; the greedy answers took the time of `direct`.
    """
    started = time.perf_counter()
    requests = [direct_messages(item.question, style) for item in questions for _ in range(count - 1)]
    samples = iter(sampler(requests) if requests else [])
    records = []
    for item, first in zip(questions, direct.records, strict=True):
        drawn = [next(samples) for _ in range(count - 1)]
        votes = Counter([first["answer"], *(_number(answer) for answer in drawn)])
        votes.pop(None, None)
        winner = votes.most_common(1)[0][0] if votes else None  # in a tie, the answer counted first wins
        answers = [answer for answer in drawn if answer.error is None]
        error = next((found for found in (first["error"], *(answer.error for answer in drawn)) if found), None)
        counts = [first["total_tokens"], *(answer.tokens for answer in drawn)]
        tokens = None if error or None in counts else sum(counts)
        correct = error is None and winner is not None and Decimal(winner) == parse_gold(item.answer)
        records.append(
            {
                **first,
                "row": VOTE,
                "answer": winner,
                "correct": correct,
                "votes": dict(votes),
                "worker_answers": first["worker_answers"] + len(answers),
                "worker_cut_off": first["worker_cut_off"] + sum(not answer.finished for answer in answers),
                "worker_tokens": tokens,
                "total_tokens": tokens,
                "error": error,
            }
        )
    return Row(VOTE, records, time.perf_counter() - started)


def votes_for(budget: float, direct: Row) -> int:
    """Number of direct answers per question that together reach a token budget, at least three.

    Two votes would not be enough, because the greedy answer would always win. So direct solving gets at least as many
    tokens as the budget, and often more.

    Args:
        budget: tokens per question.
        direct: row of direct solving, whose mean length is used.
    """
    cost = direct.mean("total_tokens")
    # If every question of one of the rows failed, the budget or the cost is not a number.
    return max(MIN_VOTES, math.ceil(budget / max(1.0, cost))) if math.isfinite(budget + cost) else MIN_VOTES


def _number(answer: Generation | None) -> str | None:
    """The number in an answer as text; equal numbers give equal texts."""
    number = None if answer is None else extract_prediction(answer.text, finished=answer.finished)
    return None if number is None else f"{number.normalize():f}"


def _run(
    name: str,
    questions: Sequence[Question],
    executor: PipelineExecutor,
    plans: Sequence[Generation],
    started: float | None = None,
) -> Row:
    started = time.perf_counter() if started is None else started
    items = [
        PipelineItem(plan.text, item.question, item.answer, plan.tokens, plan.finished)
        for item, plan in zip(questions, plans, strict=True)
    ]
    # If the request for a plan failed, the question is not solved directly: that happens only for an invalid plan.
    written = iter(executor.execute_batch([i for i, plan in zip(items, plans, strict=True) if plan.error is None]))
    records = [
        _record(name, next(written))
        if plan.error is None
        else _unplanned(name, PipelineResult(item, None, error=f"planner: {plan.error}"))
        for item, plan in zip(items, plans, strict=True)
    ]
    for record, question in zip(records, questions, strict=True):
        record["problems"] = max(1, len(question.parts))
    return Row(name, records, time.perf_counter() - started)


def _unplanned(name: str, result: PipelineResult) -> dict[str, Any]:
    """The record of a question for which the planner failed."""
    unknown = dict.fromkeys(("planner_output", "decomposed", "invalid_plan", "plan_contains_answer"))
    return {**_record(name, result), **unknown}


def _record(name: str, result: PipelineResult) -> dict[str, Any]:
    """The record of one question in one row, as JSON-ready values."""
    plan = result.plan
    written = [answer for answer in result.worker_answers if answer.error is None]
    return {
        "row": name,
        "question": result.item.question,
        "gold": f"{result.item.gold:f}",
        "planner_output": result.item.planner_output,
        "decomposed": result.decomposed,
        "invalid_plan": plan is None,
        "plan_contains_answer": None if plan is None else result.contains_answer,
        "subproblems": list(plan.subproblems) if plan is not None else [],
        "subproblem_count": len(plan.subproblems) if plan is not None and plan.should_decompose else None,
        "solutions": [solution.text for solution in result.solutions],
        "final": None if result.final is None else result.final.text,
        "finished": None if result.final is None else result.final.finished,
        "answer": _number(result.final),
        "correct": result.correct,
        "worker_answers": len(written),
        "worker_cut_off": sum(not answer.finished for answer in written),
        "planner_tokens": None if result.error else result.item.planner_tokens,
        "worker_tokens": None if result.error else result.worker_tokens,
        "total_tokens": None if result.error else result.total_tokens,
        "independence": result.independence if result.decomposed else None,
        "error": result.error,
    }


def in_order(rows: Sequence[Row]) -> list[Row]:
    """The rows in the order of the table."""
    return sorted(rows, key=lambda row: ORDER.index(row.name) if row.name in ORDER else len(ORDER))


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The content of `evaluation.json`: a summary per row, in the order of the table, and the paired tests.

    With composed questions there are additional figures, see `common.evaluation.composed`.
    """
    alone = next((row.records for row in rows if row.name == PARTS), None)
    rows = in_order([row for row in rows if row.name != PARTS])
    summary: dict[str, Any] = {"questions": len(rows[0].records), "rows": {}, "paired": {}}
    for row in rows:
        correct = sum(record["correct"] for record in row.records)
        plans = [json.dumps(record["subproblems"]) for record in row.records if record["decomposed"]]
        failed = [record for record in row.records if record["error"] is not None]
        answered = [record for record in row.records if record["error"] is None]
        answers = sum(record["worker_answers"] for record in row.records)
        summary["rows"][row.name] = {
            "correct": correct,
            "accuracy": correct / len(row.records),
            "interval_95": wilson_interval(correct, len(row.records)),
            "invalid_plan_rate": _finite(row.mean("invalid_plan")),
            "decomposition_rate": _finite(row.mean("decomposed")),
            "subproblems_per_plan": _finite(row.mean("subproblem_count")),
            "plan_contains_answer_rate": _finite(row.mean("plan_contains_answer")),
            "distinct_plans": len(set(plans)) / len(plans) if plans else None,
            "planner_tokens": _finite(row.mean("planner_tokens")),
            "worker_tokens": _finite(row.mean("worker_tokens")),
            "total_tokens": _finite(row.mean("total_tokens")),
            "independence": _finite(row.mean("independence")),
            "worker_cut_off_rate": sum(record["worker_cut_off"] for record in row.records) / answers
            if answers
            else None,
            "no_answer_rate": sum(record["answer"] is None for record in answered) / len(answered)
            if answered
            else None,
            "errors": len(failed),
            "planner_failures": sum(record["invalid_plan"] is None for record in failed),
            "worker_failures": sum(record["invalid_plan"] is not None for record in failed),
            "first_error": failed[0]["error"] if failed else None,
            "seconds": row.seconds,
        }
    trained = next((row for row in rows if row.name == TRAINED), None)
    if trained is not None:
        for row in rows:
            if row is not trained:
                mine, theirs = ([record["correct"] for record in r.records] for r in (trained, row))
                only_trained, only_other, p = mcnemar_exact(mine, theirs)
                summary["paired"][row.name] = {"only_trained": only_trained, "only_other": only_other, "p": p}
    planners = [row.name for row in rows if row.name not in (DIRECT, VOTE)]
    apart = summarise_composed({row.name: row.records for row in rows}, alone, planners, TRAINED, DIRECT)
    return summary if apart is None else {**summary, "composed": apart}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def save_scoreboard(rows: Sequence[Row], output_dir: Path, others: Sequence[Row] = ()) -> dict[str, Any]:
    """Write evaluation.json, evaluation.jsonl (one line per question and row) and evaluation.png.

    Args:
        rows: finished rows, all with the same questions. If there are none, only evaluation.jsonl is written.
        output_dir: folder of the files.
        others: rows for evaluation.jsonl alone: one that is being made, and earlier ones that may be used again.

    Returns:
        The summary, as in evaluation.json.
    """
    lines = [
        json.dumps({**record, "seconds": row.seconds, "fingerprint": row.fingerprint})
        for row in in_order([*rows, *others])
        for record in row.records
    ]
    write_text_atomically(output_dir / RECORDS, "\n".join(lines) + "\n")
    if not rows:
        return {}
    summary = summarise(rows)
    write_json(output_dir / "evaluation.json", summary)
    plot_scoreboard(summary, output_dir / "evaluation.png", highlight=TRAINED)
    return summary


def stored_rows(output_dir: Path) -> dict[str, Row]:
    """The rows of `evaluation.jsonl` by name. Rows without a stored fingerprint are left out.

    Raises:
        JsonLinesError: for a file that contains something else than rows.
    """
    rows: dict[str, Row] = {}
    if (output_dir / RECORDS).exists():
        for record in read_jsonl(output_dir / RECORDS):
            seconds, fingerprint = record.pop("seconds", None), record.pop("fingerprint", None)
            known = isinstance(record.get("row"), str) and isinstance(fingerprint or {}, dict)
            if not known or not {"question", "error"} <= record.keys():
                raise JsonLinesError(
                    f"{output_dir / RECORDS} holds something else than rows of a scoreboard: remove it"
                )
            if fingerprint and seconds is not None:
                name = record["row"] = EARLIER_NAMES.get(record["row"], record["row"])
                row = rows.setdefault(name, Row(name, [], seconds, fingerprint))
                row.records.append(record)
    return rows


def why_not_again(row: Row, now: Fingerprint, questions: Sequence[Question]) -> str | None:
    """The reason why a stored row cannot be used again, as the end of "it was …"; None if it can.

    A row that holds only the first of the questions can: the others are added to it.
    """
    others = difference(row.fingerprint, now)
    if others:
        return f"made with other {', '.join(others)}"
    if [record["question"] for record in row.records] != [item.question for item in questions[: len(row.records)]]:
        return "made of other questions"
    return "with errors" if any(record["error"] is not None for record in row.records) else None
