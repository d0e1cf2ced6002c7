"""Numbers that a plan tells without digits: in words, or as arithmetic that is left to compute."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest

from common.grading import numbers_in_words, values_in


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("The answer is forty-two.", {42}),
        ("one hundred and five pens", {105}),
        ("Two thousand, one hundred and six", {2106}),
        ("a hundred thousand or six hundred million two thousand", {100_000, 600_002_000}),
        # a list is no number
        ("two, three and four", {2, 3, 4}),
        ("twenty and five", {20, 5}),
        ("forty two three", {42, 3}),
        # no number words
        ("someone attends often", set()),
        ("12 and 5", set()),
    ],
)
def test_whole_numbers_in_words(text: str, numbers: set[int]) -> None:
    assert numbers_in_words(text) == numbers


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("Compute 6*7.", {42}),
        ("six times seven", {42}),
        ("(16 - 3 - 4) * 2 dollars", {18}),
        ("$1,200 / 4, then 12 divided by 4 plus 1", {300, 4}),
        ("15 + 28 = 43", {43}),
        ("2 + 3 × 4", {14}),
        ("3 songs * 10 hours per song * 10 days per song = 300 hours", {300}),
        ("Take six boxes times seven pens, 20 pens - 5 pens", {42, 15}),
        ("pay 5 dollars a day and 3 + 4", {7}),
        ("- 6 x 7 (see 1.5 · 3)", {42, Decimal("4.5")}),
        # no finite decimal, no expression, or more than plain arithmetic
        ("1/3", set()),
        ("5/0", set()),
        ("Add the 2 answers: (A) + (B)", set()),
        ("1 2", set()),
        ("2**5", set()),
        ("(2 + 3)(4)", set()),
    ],
)
def test_values_of_expressions(text: str, values: set[Decimal]) -> None:
    assert values_in(text) == values


def test_no_text_makes_them_raise_or_slow() -> None:
    texts = ["(", "1+", "one ", "1 ", "9", "1,", "9" * 40 + "*", "(1+", "hundred thousand ", "0." + "0" * 39 + "1/"]
    for piece in texts:
        text = (piece * (300_000 // len(piece)))[:300_000]
        started = time.process_time()
        numbers_in_words(text)
        values_in(text)
        assert time.process_time() - started < 20, piece
    assert values_in("*".join(["9" * 40] * 16)) == {Decimal((10**40 - 1) ** 16)}, "nothing is rounded"
    assert values_in("/".join(["1", *["1024"] * 12])) == set(), "too many decimals"
