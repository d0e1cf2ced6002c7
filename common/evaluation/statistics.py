"""Confidence intervals and paired tests of the scoreboard."""

from __future__ import annotations

from collections.abc import Sequence


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927), which stays in [0, 1] and is sound near both ends."""
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(left: Sequence[bool], right: Sequence[bool]) -> tuple[int, int, float]:
    """McNemar's exact test for two solvers on the same questions.

    Returns:
        (questions only the left solved, questions only the right solved, two-sided p): under the
        hypothesis of equal skill each of the discordant questions is a fair coin (binomial test).
    """
    from scipy.stats import binomtest

    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    discordant = only_left + only_right
    return only_left, only_right, float(binomtest(only_left, discordant).pvalue) if discordant else 1.0
