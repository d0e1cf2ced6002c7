"""The result of one model call, with its token count, and the counters that a worker keeps over many calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class Generation:
    """A model's answer to one prompt.

    Attributes:
        text: the completion.
        tokens: number of generated tokens, end-of-sequence token included and padding excluded. None if a server does
            not report it and it could not be counted here.
        finished: False if the completion was cut off by its token limit.
        error: why there is no answer; None if there is one.
    """

    text: str
    tokens: int | None
    finished: bool
    error: str | None = None


@dataclass(slots=True)
class WorkerStats:
    """Counters of a worker since the last `take_stats`; times in seconds."""

    requests: int = 0
    generated: int = 0  # requests that the model ran; the others were duplicates or came from the cache
    generated_tokens: int = 0
    failures: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0  # part of `seconds` spent in the model; the rest is rendering and tokenising

    @property
    def cache_hit_rate(self) -> float:
        """Share of requests in [0, 1] that were answered without running the model; 0 without requests."""
        return 1 - self.generated / self.requests if self.requests else 0.0


def total_stats(parts: Sequence[WorkerStats]) -> WorkerStats:
    """The counts of several workers together; seconds add up too."""
    return WorkerStats(*(sum(values) for values in zip(*map(astuple, parts), strict=True)))
