"""Where the time of a training step goes: planner, worker, embeddings, forward and backward, saving, and the rest.

Costs a few clock readings a step. Only the standard library is imported here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

# In the order in which a step goes through them; its first part belongs to the step before, whose line is written
# by then. `worker_seconds` is the reward function's own metric.
PARTS = {
    "saving_seconds": "logs and checkpoint of the step before",
    "planner_seconds": "planner writes plans",
    "worker_seconds": "worker carries them out",
    "embedding_seconds": "embeddings",
    "gradient_seconds": "forward and backward",
    "rest_seconds": "rest (optimiser, grading)",
}


class StepClock:
    """Adds up the seconds of named parts since the last `take`; what no part claims is the rest."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._since = time.perf_counter()
        self._between = self._first = True  # no step is under way; none has been

    def restart(self) -> None:
        """Forget everything so far, up to the first `begin`: loading and resuming are no part of a step."""
        self._parts.clear()
        self._since = time.perf_counter()
        self._between = self._first = True

    def begin(self) -> None:
        """A step begins, if none is under way: what passed since the last one went into logs and checkpoints."""
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
        """Count seconds towards a part."""
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    @contextmanager
    def part(self, name: str, *, without: Sequence[str] = ()) -> Iterator[None]:
        """Count the time inside towards `name`, except what parts named in `without` claim of it."""
        started, claimed = time.perf_counter(), self._total(without)
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started - (self._total(without) - claimed))

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call (or `restart`), and of the rest; they sum to the time passed."""
        now = time.perf_counter()
        taken = {name: self._parts.get(name, 0.0) for name in PARTS if name != "rest_seconds"}
        taken["rest_seconds"] = max(0.0, now - self._since - sum(taken.values()))
        self._parts.clear()
        self._since, self._between = now, True
        return taken

    def _total(self, names: Sequence[str]) -> float:
        return sum(self._parts.get(name, 0.0) for name in names)


def breakdown_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Mean seconds and share of each part over the steps of `metrics.jsonl`; no rows where no step has them."""
    steps = [record for record in records if record.get("rest_seconds") is not None]
    if not steps:
        return []
    means = {name: sum(step.get(name) or 0.0 for step in steps) / len(steps) for name in PARTS}
    whole = sum(means.values())
    return [
        {"a step's time": title, "seconds": f"{means[name]:.2f}", "share": f"{100 * means[name] / whole:.1f}%"}
        for name, title in PARTS.items()
    ]
