"""Figures of the scoreboard for composed questions (made of several problems), separate from single questions.

The reasoning gap (Compositional GSM, arXiv:2410.01748) compares composed questions with their problems one by one. It
is S_comp − S1 · S2. S_comp is the share of composed questions that are solved. S1 and S2 are the shares of first and of
second problems that the worker solves alone. A negative gap means that composing makes the problems harder.

If questions have different numbers of problems, the product is computed for each question and averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.evaluation.statistics import mcnemar_exact, wilson_interval

RESAMPLES = 2000
Records = Sequence[dict[str, Any]]


def is_composed(record: dict[str, Any]) -> bool:
    """Whether a record of the scoreboard belongs to a composed question."""
    return record.get("problems", 1) > 1


def summarise_composed(
    rows: Mapping[str, Records], alone: Records | None, planners: Sequence[str], trained: str, direct: str
) -> dict[str, Any] | None:
    """The figures for composed and single questions in `evaluation.json`; None if no question is composed.

    `gap_closed` is the share of direct solving's reasoning gap that the trained planner removes: 1 − trained / direct.

    Args:
        rows: records of each row, in the order of the questions.
        alone: records of the composed questions' problems, solved one by one, in order; None if they were not solved.
        planners: names of the rows that have a planner.
        trained, direct: names of the rows of the trained planner and of direct solving.
    """
    some = next(iter(rows.values()))
    counts = [record["problems"] for record in some if is_composed(record)]
    if not counts:
        return None
    solved = None if alone is None else _by_question([record["correct"] for record in alone], counts)
    found: dict[str, Any] = {
        "composed": len(counts),
        "single": len(some) - len(counts),
        "parts_alone": None,
        "rows": {},
        "paired": {},
        "gap_closed": None,
    }
    if alone is not None and solved is not None:
        found["parts_alone"] = {
            "accuracy_by_place": _by_place(solved),
            "expected": expected_accuracy(solved),
            "errors": sum(record["error"] is not None for record in alone),
        }
    for name, records in rows.items():
        composed = [record for record in records if is_composed(record)]
        single = [record for record in records if not is_composed(record)]
        found["rows"][name] = {
            "composed": _accuracy(composed),
            "single": _accuracy(single),
            "gap": None if solved is None else reasoning_gap([record["correct"] for record in composed], solved),
            **(_decisions(composed, single) if name in planners else {}),
        }
        if trained in rows and name != trained:
            found["paired"][name] = {
                kind: _paired([(mine["correct"], other["correct"]) for mine, other in pairs])
                for kind, pairs in _pairs(rows[trained], records).items()
            }
    gaps = [found["rows"].get(name, {}).get("gap") for name in (trained, direct)]
    if all(gaps) and gaps[1]["gap"] < 0:
        found["gap_closed"] = 1 - gaps[0]["gap"] / gaps[1]["gap"]
    return found


def expected_accuracy(solved: Sequence[Sequence[bool]]) -> float:
    """Expected share of solved questions, if every problem is solved as often as alone, and independently.

    Args:
        solved: for each question, which of its problems were solved alone.
    """
    shares = _by_place(solved)
    product = [1.0]
    for share in shares:
        product.append(product[-1] * share)
    return sum(product[len(parts)] for parts in solved) / len(solved)


def reasoning_gap(correct: Sequence[bool], solved: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """The reasoning gap with its 95 % interval.

    The interval is a percentile bootstrap over questions (Efron 1979, https://doi.org/10.1214/aos/1176344552). Its
    random generator has a fixed seed, so the same input gives the same interval.

    Args:
        correct: for each composed question, whether it was solved.
        solved: for each of them, which of its problems were solved alone.

    Returns:
        `gap`, a difference of shares in [−1, 1], and `interval_95`, its lower and upper end.
    """
    import numpy as np

    right = np.array(correct, dtype=float)
    lengths = np.array([len(parts) for parts in solved])
    table = np.zeros((len(solved), lengths.max()))
    for place, parts in enumerate(solved):
        table[place, : len(parts)] = parts
    there = np.arange(lengths.max()) < lengths[:, None]  # (questions, places)

    def gap(chosen: Any) -> float:
        shares = table[chosen].sum(0) / np.maximum(1, there[chosen].sum(0))
        return float(right[chosen].mean() - np.cumprod(shares)[lengths[chosen] - 1].mean())

    draw = np.random.default_rng(0)
    drawn = [gap(draw.integers(0, len(right), len(right))) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"gap": gap(np.arange(len(right))), "interval_95": (float(low), float(high))}


def _decisions(composed: Records, single: Records) -> dict[str, Any]:
    """Shares of right decisions: composed questions split, single ones not. An invalid plan is never right."""
    split = [record["decomposed"] is True for record in composed]
    left = [record["decomposed"] is False and record["invalid_plan"] is False for record in single]
    return {
        "composed_split": _share(split),
        "single_left_whole": _share(left),
        "right_decisions": _share([*split, *left]),
    }


def _accuracy(records: Records) -> dict[str, Any] | None:
    if not records:
        return None
    correct = sum(record["correct"] for record in records)
    return {
        "correct": correct,
        "accuracy": correct / len(records),
        "interval_95": wilson_interval(correct, len(records)),
        "total_tokens": _share([record["total_tokens"] for record in records if record["total_tokens"] is not None]),
    }


def _pairs(mine: Records, others: Records) -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    both = list(zip(mine, others, strict=True))
    return {
        "composed": [pair for pair in both if is_composed(pair[0])],
        "single": [pair for pair in both if not is_composed(pair[0])],
    }


def _paired(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    only_trained, only_other, p = mcnemar_exact([mine for mine, _ in pairs], [other for _, other in pairs])
    return {"only_trained": only_trained, "only_other": only_other, "p": p}


def _by_question(values: Sequence[bool], counts: Sequence[int]) -> list[list[bool]] | None:
    """The values of all problems, grouped by question; None if some values are missing."""
    if len(values) != sum(counts):
        return None
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in counts]


def _by_place(solved: Sequence[Sequence[bool]]) -> list[float]:
    """Share of solved problems among the first problems of all questions, among the second ones, and so on."""
    longest = max(map(len, solved))
    found = [[parts[place] for parts in solved if len(parts) > place] for place in range(longest)]
    return [sum(values) / len(values) for values in found]


def _share(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
