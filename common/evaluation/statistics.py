"""Confidence intervals and paired tests for the scoreboard."""

from __future__ import annotations

from collections.abc import Sequence


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    It stays within [0, 1] and is reliable near both ends.

    Args:
        successes: number of successes.
        trials: number of trials, at least 1.

    Returns:
        Lower and upper end, shares in [0, 1].
    """
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(left: Sequence[bool], right: Sequence[bool]) -> tuple[int, int, float]:
    """McNemar's exact test for two solvers on the same questions (McNemar 1947, https://doi.org/10.1007/BF02295996).

    Only questions that exactly one of the two solved count. If both solvers are equally good, each such question was
    solved by the first one with probability 1/2. So the number that it solved follows a binomial distribution.

    Args:
        left: per question, whether the first solver was right.
        right: the same for the second solver.

    Returns:
        Number of questions that only `left` solved, number that only `right` solved, and the two-sided p-value.
    """
    from scipy.stats import binomtest

    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    discordant = only_left + only_right
    return only_left, only_right, float(binomtest(only_left, discordant).pvalue) if discordant else 1.0
