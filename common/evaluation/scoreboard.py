"""The scoreboard: does planning pay, against direct solving and against planners that were not trained?

Rows share the questions, the worker and the executor; they differ in who plans. A plan that cannot be
used falls back to direct solving in every row, as it does when the planner is served.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from common.evaluation.statistics import mcnemar_exact, wilson_interval
from common.generation import Generation
from common.grading import GRADER_VERSION, extract_prediction, parse_gold
from common.pipeline import PipelineExecutor, PipelineItem, PipelineResult
from common.plans import Plan
from common.problems.questions import Question
from common.prompts import Message, direct_messages, planner_messages
from common.reports.jsonl import read_jsonl
from common.reports.plots import plot_scoreboard
from common.runs.files import write_json, write_text_atomically

Answerer = Callable[[Sequence[Sequence[Message]]], list[Generation]]

DIRECT, VOTE, UNTRAINED, SUPERVISED, TRAINED = (
    "direct",
    "direct, equal tokens",
    "untrained planner",
    "supervised planner",
    "trained planner",
)
ORDER = (DIRECT, VOTE, UNTRAINED, SUPERVISED, TRAINED)
RECORDS = "evaluation.jsonl"
VOTE_TEMPERATURE = 0.7  # of the samples that direct solving votes over, as in the self-consistency paper
MIN_VOTES = 3


@dataclass(slots=True)
class Row:
    """One contestant: a record per question (in the order of the questions), and the seconds it took."""

    name: str
    records: list[dict[str, Any]]
    seconds: float

    def mean(self, key: str) -> float:
        """Average of a field over the questions that have it; nan without any."""
        values = [record[key] for record in self.records if record[key] is not None]
        return sum(values) / len(values) if values else math.nan


def run_direct(questions: Sequence[Question], executor: PipelineExecutor) -> Row:
    """The worker alone, steps written out, greedy."""
    plan = Plan(False, ()).to_json()
    return _run(DIRECT, questions, executor, [Generation(plan, 0, True) for _ in questions])


def run_planner(
    name: str, questions: Sequence[Question], executor: PipelineExecutor, planner: Answerer, style: str
) -> Row:
    """A planner and the worker. `planner` answers the planner's prompts, greedily."""
    started = time.perf_counter()
    plans = planner([planner_messages(item.question, style) for item in questions])
    return _run(name, questions, executor, plans, started)


def run_vote(questions: Sequence[Question], direct: Row, sampler: Answerer, style: str, budget: float) -> Row:
    """Direct solving with at least the token budget of another row: majority vote over samples.

    The greedy answer is the first vote and wins ties; sampled answers follow until their mean cost
    reaches the budget (self-consistency, arXiv:2203.11171), and until there are three of them: of two votes
    the greedy one would always win. So direct solving gets at least the budget, and often more.

    Args:
        direct: the row whose greedy answers are the first votes.
        sampler: answers the worker's direct prompts, sampled.
        budget: tokens per question to be reached.
    """
    started = time.perf_counter()
    count = max(MIN_VOTES, math.ceil(budget / max(1.0, direct.mean("total_tokens"))))
    requests = [direct_messages(item.question, style) for item in questions for _ in range(count - 1)]
    samples = iter(sampler(requests) if requests else [])
    records = []
    for item, first in zip(questions, direct.records, strict=True):
        drawn = [next(samples) for _ in range(count - 1)]
        votes = Counter([first["answer"], *(_number(answer) for answer in drawn)])
        votes.pop(None, None)
        winner = votes.most_common(1)[0][0] if votes else None  # ties go to the one counted first
        counts = [first["total_tokens"], *(answer.tokens for answer in drawn)]
        tokens = None if None in counts else sum(counts)
        correct = winner is not None and Decimal(winner) == parse_gold(item.answer)
        records.append(
            {
                **first,
                "row": VOTE,
                "answer": winner,
                "correct": correct,
                "votes": dict(votes),
                "worker_answers": first["worker_answers"] + len(drawn),
                "worker_cut_off": first["worker_cut_off"] + sum(not answer.finished for answer in drawn),
                "worker_tokens": tokens,
                "total_tokens": tokens,
            }
        )
    return Row(VOTE, records, direct.seconds + time.perf_counter() - started)


def _number(answer: Generation | None) -> str | None:
    """The number that an answer gives, so written that equal numbers are equal texts."""
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
    results = executor.execute_batch(items)
    return Row(name, [_record(name, result) for result in results], time.perf_counter() - started)


def _record(name: str, result: PipelineResult) -> dict[str, Any]:
    """One question in one row, ready for a line of JSON. A failed worker counts as a wrong answer, and is told."""
    plan = result.plan
    written = [answer for answer in result.worker_answers if answer.error is None]
    return {
        "row": name,
        "grader": GRADER_VERSION,
        "question": result.item.question,
        "gold": f"{result.item.gold:f}",
        "planner_output": result.item.planner_output,
        "decomposed": result.decomposed,
        "invalid_plan": plan is None,
        "subproblems": list(plan.subproblems) if plan is not None else [],
        "subproblem_count": len(plan.subproblems) if plan is not None and plan.should_decompose else None,
        "solutions": [solution.text for solution in result.solutions],
        "final": None if result.final is None else result.final.text,
        "finished": None if result.final is None else result.final.finished,
        "answer": _number(result.final),
        "correct": result.correct,
        "worker_answers": len(written),
        "worker_cut_off": sum(not answer.finished for answer in written),
        "planner_tokens": result.item.planner_tokens,
        "worker_tokens": result.worker_tokens,
        "total_tokens": result.total_tokens,
        "independence": result.independence if result.decomposed else None,
        "error": result.error,
    }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """What `evaluation.json` holds: a summary per row and the paired tests of the last-named planner."""
    summary: dict[str, Any] = {"questions": len(rows[0].records), "rows": {}, "paired": {}}
    for row in rows:
        correct = sum(record["correct"] for record in row.records)
        plans = [json.dumps(record["subproblems"]) for record in row.records if record["decomposed"]]
        answered = [record for record in row.records if record["error"] is None]
        answers = sum(record["worker_answers"] for record in row.records)
        summary["rows"][row.name] = {
            "correct": correct,
            "accuracy": correct / len(row.records),
            "interval_95": wilson_interval(correct, len(row.records)),
            "invalid_plan_rate": row.mean("invalid_plan"),
            "decomposition_rate": row.mean("decomposed"),
            "subproblems_per_plan": _finite(row.mean("subproblem_count")),
            "distinct_plans": len(set(plans)) / len(plans) if plans else None,
            "planner_tokens": row.mean("planner_tokens"),
            "worker_tokens": row.mean("worker_tokens"),
            "total_tokens": row.mean("total_tokens"),
            "independence": _finite(row.mean("independence")),
            "worker_cut_off_rate": sum(record["worker_cut_off"] for record in row.records) / answers
            if answers
            else None,
            "no_answer_rate": sum(record["answer"] is None for record in answered) / len(answered)
            if answered
            else None,
            "worker_failures": sum(record["error"] is not None for record in row.records),
            "seconds": row.seconds,
        }
    trained = next((row for row in rows if row.name == TRAINED), None)
    if trained is not None:
        for row in rows:
            if row is not trained:
                mine, theirs = ([record["correct"] for record in r.records] for r in (trained, row))
                only_trained, only_other, p = mcnemar_exact(mine, theirs)
                summary["paired"][row.name] = {"only_trained": only_trained, "only_other": only_other, "p": p}
    return summary


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def save_scoreboard(rows: Sequence[Row], output_dir: Path) -> dict[str, Any]:
    """Write evaluation.json, evaluation.jsonl (a line per question and row) and evaluation.png.

    Returns:
        the summary.
    """
    ordered = sorted(rows, key=lambda row: ORDER.index(row.name) if row.name in ORDER else len(ORDER))
    summary = summarise(ordered)
    lines = [json.dumps({**record, "seconds": row.seconds}) for row in ordered for record in row.records]
    write_text_atomically(output_dir / RECORDS, "\n".join(lines) + "\n")
    write_json(output_dir / "evaluation.json", summary)
    plot_scoreboard(summary, output_dir / "evaluation.png", highlight=TRAINED)
    return summary


def load_rows(output_dir: Path, questions: Sequence[Question]) -> list[Row]:
    """Rows saved earlier for the very same questions and graded alike, so that a resumed run need not do them again."""
    if not (output_dir / RECORDS).exists():
        return []
    rows: dict[str, Row] = {}
    for record in read_jsonl(output_dir / RECORDS):
        if record.get("grader") != GRADER_VERSION:
            continue
        seconds = record.pop("seconds")
        rows.setdefault(record["row"], Row(record["row"], [], seconds)).records.append(record)
    asked = [item.question for item in questions]
    return [row for row in rows.values() if [record["question"] for record in row.records] == asked]
