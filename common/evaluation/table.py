"""The scoreboard as text, at most 90 columns wide: one column per solver, one line per figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from common.cli import counted
from common.evaluation.scoreboard import DIRECT, SUPERVISED, TRAINED, UNTRAINED, VOTE
from common.reports.tables import format_table

TITLES = {DIRECT: "direct", VOTE: "votes", UNTRAINED: "untrained", SUPERVISED: "supervised", TRAINED: "trained"}


def scoreboard_table(summary: dict[str, Any]) -> str:
    """The table of a summary of `common.evaluation.scoreboard.summarise`, for the terminal."""
    rows = summary["rows"]
    head = counted(summary["questions"], "held-out question")

    def line(label: str, show: Callable[[str, dict[str, Any]], str | None]) -> dict[str, object]:
        cells = {TITLES.get(name, name): show(name, row) or "-" for name, row in rows.items()}
        return {head: label, **cells}

    def of_plans(show: Callable[[dict[str, Any]], str | None]) -> Callable[[str, dict[str, Any]], str | None]:
        """`show`, but without a value for rows without a planner."""
        return lambda name, row: None if name in (DIRECT, VOTE) else show(row)

    lines = [
        line("accuracy", lambda _, row: _percent(row["accuracy"])),
        line("95% interval", lambda _, row: _range(row["interval_95"])),
        line("no answer", lambda _, row: _percent(row["no_answer_rate"])),
        line("worker cut off", lambda _, row: _percent(row["worker_cut_off_rate"])),
        line("invalid plans", of_plans(lambda row: _percent(row["invalid_plan_rate"]))),
        line("plans that split", of_plans(lambda row: _percent(row["decomposition_rate"]))),
        line("parts of a split", of_plans(lambda row: _number(row["subproblems_per_plan"]))),
        line("distinct splits", of_plans(lambda row: _percent(row["distinct_plans"]))),
        line("independence", of_plans(lambda row: _number(row["independence"]))),
        line("tokens of the plan", of_plans(lambda row: _number(row["planner_tokens"], 0))),
        line("tokens of the worker", lambda _, row: _number(row["worker_tokens"], 0)),
        line("tokens in all", lambda _, row: _number(row["total_tokens"], 0)),
        line("seconds", lambda _, row: f"{row['seconds']:.0f}"),
    ]
    text = ""
    if any(row["errors"] for row in rows.values()):
        lines.insert(2, line("failed, so wrong", lambda _, row: str(row["errors"])))
        of = counted(summary["questions"], "question")
        for name, row in rows.items():
            if row["errors"]:
                text += (
                    f"\n{name}: {row['planner_failures']} of {of} failed without "
                    f"a plan, {row['worker_failures']} while the worker solved them"
                    f"\n  the first: {_shortened(row['first_error'])}"
                )
    if any(row.get("plan_contains_answer_rate") for row in rows.values()):
        place = next(number for number, each in enumerate(lines) if each[head] == "parts of a split")
        told = line("plan has the answer", of_plans(lambda row: _percent(row["plan_contains_answer_rate"])))
        lines.insert(place, told)
    if paired := summary["paired"]:

        def test(key: str, style: str) -> Callable[[str, dict[str, Any]], str | None]:
            return lambda name, _: format(paired[name][key], style) if name in paired else None

        lines += [
            line("only trained is right", test("only_trained", "d")),
            line("only this is right", test("only_other", "d")),
            line("p (exact McNemar)", test("p", ".1e")),
        ]
        text += "\ntrained is compared with each of the others on the same questions"
    if (apart := summary.get("composed")) is not None:
        lines += _composed_lines(apart, line)
        text += _composed_text(apart)
    if VOTE in rows:
        text += "\nvotes: direct, a majority of samples that costs at least as many tokens as trained"
    return format_table(lines) + text


def _composed_lines(apart: dict[str, Any], line: Callable[..., dict[str, object]]) -> list[dict[str, object]]:
    """Lines with separate figures for composed and for single questions."""

    def of(*keys: str, show: Callable[[Any], str | None]) -> Callable[[str, dict[str, Any]], str | None]:
        def cell(name: str, _: dict[str, Any]) -> str | None:
            value: Any = apart["rows"][name]
            for key in keys:
                value = None if value is None else value.get(key)
            return None if value is None else show(value)

        return cell

    def p_value(kind: str) -> Callable[[str, dict[str, Any]], str | None]:
        return lambda name, _: format(apart["paired"][name][kind]["p"], ".1e") if name in apart["paired"] else None

    lines = [
        line("composed: accuracy", of("composed", "accuracy", show=_percent)),
        line("composed: 95%", of("composed", "interval_95", show=_range)),
        line("composed: tokens", of("composed", "total_tokens", show=lambda value: _number(value, 0))),
        line("composed: reasoning gap", of("gap", "gap", show=_percent)),
        line("composed: gap, 95%", of("gap", "interval_95", show=_signed_range)),
        line("composed: split", of("composed_split", show=_percent)),
        line("composed: p", p_value("composed")),
    ]
    if apart["single"]:
        lines += [
            line("single: accuracy", of("single", "accuracy", show=_percent)),
            line("single: 95%", of("single", "interval_95", show=_range)),
            line("single: tokens", of("single", "total_tokens", show=lambda value: _number(value, 0))),
            line("single: left whole", of("single_left_whole", show=_percent)),
            line("single: p", p_value("single")),
            line("right decisions", of("right_decisions", show=_percent)),
        ]
    return [each for each in lines if any(cell != "-" for cell in list(each.values())[1:])]


def _composed_text(apart: dict[str, Any]) -> str:
    text = f"\n{apart['composed']} composed questions and {apart['single']} single ones"
    if (alone := apart["parts_alone"]) is not None:
        shares = ", ".join(f"{100 * share:.1f}%" for share in alone["accuracy_by_place"])
        text += f"; their first, second, … problems\nare solved alone in {shares}, which would give "
        text += f"{100 * alone['expected']:.1f}%:\nthe reasoning gap is the accuracy minus that (negative: worse)"
        if alone["errors"]:
            text += f"\n{alone['errors']} of these problems failed, and count as not solved"
    if apart["gap_closed"] is not None:
        text += f"\nof the gap of direct solving, trained closes {100 * apart['gap_closed']:.0f}%"
    return text


def _range(ends: Sequence[float]) -> str:
    return "{:.1f}-{:.1f}".format(*(100 * end for end in ends))


def _signed_range(ends: Sequence[float]) -> str:
    return "{:.0f}..{:.0f}".format(*(100 * end for end in ends))


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}%"


def _number(value: float | None, digits: int = 2) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _shortened(text: str, limit: int = 100) -> str:
    """The beginning of a message, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
