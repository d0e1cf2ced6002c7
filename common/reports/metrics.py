"""The numbers of a training step, and a table that compares the first steps with the last."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from common.reports.tables import format_table


def step_metrics(logs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The numbers of one training step's log; None if `logs` is an evaluation or the summary at the end of training.

    A metric without a value in this step (TRL logs None or NaN) is kept as None.
    """
    if not logs or "train_runtime" in logs or any(name.startswith("eval_") for name in logs):
        return None
    metrics: dict[str, Any] = {}
    for name, value in logs.items():
        if value is None:
            metrics[name] = None
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):  # numpy's scalars are Real too
            number = int(value) if isinstance(value, numbers.Integral) else float(value)
            metrics[name] = number if math.isfinite(number) else None
    return metrics


SUMMARY = {
    "reward": "reward",
    "correctness": "correct answers",
    "invalid_plan_rate": "invalid plans",
    "decomposition_rate": "plans that split",
    "decomposition_rate_composed": "- composed questions",
    "decomposition_rate_single": "- single questions",
    "distinct_plans": "distinct plans",
    "independence": "independence",
    "planner_tokens": "planner tokens",
    "worker_tokens": "worker tokens",
    "step_time": "seconds per step",
}


def summary_table(records: list[dict[str, Any]]) -> str:
    """Means over the first and the last fifth of the steps, as a table for the terminal.

    Args:
        records: lines of metrics.jsonl, one per step.
    """
    part = max(1, len(records) // 5)
    rows = []
    for key, title in SUMMARY.items():
        if all(record.get(key) is None for record in records):
            continue  # such as composed questions where there are none
        row: dict[str, object] = {"": title}
        for name, chosen in (("first steps", records[:part]), ("last steps", records[-part:])):
            values = [record[key] for record in chosen if record.get(key) is not None]
            row[name] = f"{sum(values) / len(values):.3g}" if values else "-"
        rows.append(row)
    return format_table(rows)
