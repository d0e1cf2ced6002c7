"""What one call of a model gives: the answer with its token count, and the counts kept over many calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Generation:
    """A model's answer to one prompt.

    `tokens` counts what was generated, the end-of-sequence token included and padding excluded; it is None where a
    server does not tell and nobody could count. `finished` is false where the answer was cut off; `error` says why
    there is no answer.
    """

    text: str
    tokens: int | None
    finished: bool
    error: str | None = None


@dataclass(slots=True)
class WorkerStats:
    """Counts since the last `take_stats`."""

    requests: int = 0
    generated: int = 0  # requests that were run rather than shared or remembered
    generated_tokens: int = 0
    failures: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0  # of them in the model; the rest is rendering and tokenising

    @property
    def cache_hit_rate(self) -> float:
        """Share of requests answered without running the model (0 where there was none)."""
        return 1 - self.generated / self.requests if self.requests else 0.0
