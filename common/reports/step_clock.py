"""Measure the parts of a training step: planner, worker, embeddings, forward and backward pass, saving, the rest.

It reads the clock a few times per step. Only the standard library is imported here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

# Parts in their order within a step. The first is time after the step before: that step's log line is already written,
# so the time is logged with the next step. The reward function measures `worker_seconds` and `embedding_seconds`.
PARTS = {
    "saving_seconds": "logs and checkpoint of the step before",
    "planner_seconds": "planner writes plans",
    "worker_seconds": "worker carries them out",
    "embedding_seconds": "embeddings",
    "gradient_seconds": "forward and backward",
    "rest_seconds": "rest (optimiser, grading)",
}


class StepClock:
    """Sum the seconds of named parts since the last `take`. Time that belongs to no part is the rest."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._since = time.perf_counter()
        self._between = self._first = True  # between two steps; before the first step

    def restart(self) -> None:
        """Discard all times so far and until the first `begin`: loading and resuming belong to no step."""
        self._parts.clear()
        self._since = time.perf_counter()
        self._between = self._first = True

    def begin(self) -> None:
        """Mark the beginning of a step, if none is running. The time since the last one counts as `saving_seconds`."""
        if not self._between:
            return
        now = time.perf_counter()
        if self._first:
            self._parts.clear()
            self._since = now
        else:
            self.add("saving_seconds", now - self._since)
        self._between = self._first = False

    def add(self, part: str, seconds: float) -> None:
        """Add seconds to a part."""
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    @contextmanager
    def part(self, name: str, *, without: Sequence[str] = ()) -> Iterator[None]:
        """Context manager: add the time inside to `name`, minus the time that the parts in `without` took meanwhile."""
        started, claimed = time.perf_counter(), self._total(without)
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started - (self._total(without) - claimed))

    def take(self) -> dict[str, float]:
        """Seconds of each part, and of the rest, since the last call or `restart`. They sum to the elapsed time."""
        now = time.perf_counter()
        taken = {name: self._parts.get(name, 0.0) for name in PARTS if name != "rest_seconds"}
        taken["rest_seconds"] = max(0.0, now - self._since - sum(taken.values()))
        self._parts.clear()
        self._since, self._between = now, True
        return taken

    def _total(self, names: Sequence[str]) -> float:
        return sum(self._parts.get(name, 0.0) for name in names)


def breakdown_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Mean seconds and share of the step time per part, from the records of metrics.jsonl; [] if no record has them."""
    steps = [record for record in records if record.get("rest_seconds") is not None]
    if not steps:
        return []
    means = {name: sum(step.get(name) or 0.0 for step in steps) / len(steps) for name in PARTS}
    whole = sum(means.values())
    return [
        {"a step's time": title, "seconds": f"{means[name]:.2f}", "share": f"{100 * means[name] / whole:.1f}%"}
        for name, title in PARTS.items()
    ]
