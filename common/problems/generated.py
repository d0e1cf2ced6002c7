"""Generated word problems that are easy enough for a small model: who has how many things, and how many in all?

    Joe has 5 cups, Eve has 1, Fay has 4 and Gus has 2. How many cups do they have in all?

A 135M model adds two such numbers almost always, but often fails with four. So splitting helps (docs/results.md has
the figures), and planning can be learned on these problems without a GPU.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl

from common.errors import UserError
from common.plans import Plan

PREFIX, REASONING_GYM = "generated:", "reasoning-gym:"  # how the names of generated sources begin
FAMILY = "shares"
NAMES = ("Ann", "Bob", "Cal", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Joe")
ITEMS = ("pens", "cards", "coins", "books", "shells", "cups")
# Of the plans to imitate: share of direct plans, and share of splits that use every number exactly once.
DIRECT_SHARE = 0.2
COVERING_SHARE = 0.4
OPTIONS = {"people": 4, "low": 1, "high": 5}
_PATTERN = re.compile(r"(?:^|, | and )([A-Z][a-z]+) has (\d+)")


@dataclass(frozen=True, slots=True)
class Shares:
    """One problem: person `names[i]` has `amounts[i]` pieces of `item`."""

    names: tuple[str, ...]
    amounts: tuple[int, ...]
    item: str

    @property
    def question(self) -> str:
        """The problem as text."""
        first, *rest = zip(self.names, self.amounts, strict=True)
        parts = [f"{first[0]} has {first[1]} {self.item}", *(f"{name} has {amount}" for name, amount in rest)]
        return f"{', '.join(parts[:-1])} and {parts[-1]}. How many {self.item} do they have in all?"

    @property
    def answer(self) -> str:
        """The solution in GSM8K's form: the steps, then the number."""
        return f"{' + '.join(map(str, self.amounts))} = {sum(self.amounts)}\n#### {sum(self.amounts)}"


def query_options(source: str, query: str) -> dict[str, str]:
    """The options behind the question mark of a source.

    Raises:
        UserError: if one is given twice.
    """
    given = parse_qsl(query, keep_blank_values=True)
    options = dict(given)
    twice = next((name for name in options if [other for other, _ in given].count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--dataset {source}: {twice} is given twice: leave one of them out")
    return options


def parse_source(source: str) -> dict[str, int]:
    """The options in a source such as `generated:shares?people=4&low=1&high=5`.

    Raises:
        UserError: for another family, an unknown option, or a value out of range.
    """
    family, _, query = source.removeprefix(PREFIX).partition("?")
    if family != FAMILY:
        raise UserError(f"--dataset {source}: there is no generated family {family!r}: use {PREFIX}{FAMILY}")
    options = dict(OPTIONS)
    for name, value in query_options(source, query).items():
        if name not in options or not value.isdigit():
            raise UserError(
                f"--dataset {source}: found {name}={value}, the options are whole numbers: "
                + ", ".join(f"{known}={default}" for known, default in OPTIONS.items())
            )
        options[name] = int(value)
    if not 2 <= options["people"] <= len(NAMES) or options["low"] > options["high"]:
        raise UserError(f"--dataset {source}: people must lie between 2 and {len(NAMES)}, and low not above high")
    return options


def shares(source: str, seed: int) -> Iterator[Shares]:
    """An endless sequence of problems. The same seed gives the same problems."""
    options = parse_source(source)
    draw = random.Random(seed)
    while True:
        names = tuple(draw.sample(NAMES, options["people"]))
        amounts = tuple(draw.randint(options["low"], options["high"]) for _ in names)
        yield Shares(names, amounts, draw.choice(ITEMS))


def amounts_of(question: str) -> list[int]:
    """The numbers of a problem of this family, in their order; [] for any other question."""
    return [int(amount) for _, amount in _PATTERN.findall(question)]


def demonstrate(question: str, draw: random.Random) -> Plan | None:
    """A plan of varying kind for a problem of this family, for a supervised warm start; None for other questions.

    It teaches the format, not the best plan. One plan in five is direct. The others take the problem's numbers in
    pairs, and more than half of them stop too early or count numbers twice; GRPO finds out which plans earn more. All
    pairs follow the problem's order, because random order taught a small model to copy numbers wrongly
    (docs/results.md).

    Args:
        question: the problem.
        draw: random generator that decides the kind of plan.
    """
    amounts = amounts_of(question)
    if len(amounts) < 2:
        return None
    if draw.random() < DIRECT_SHARE:
        return Plan(False, ())
    pairs = [amounts[start : start + 2] for start in range(0, len(amounts), 2)]
    overlapping = [amounts[start : start + 2] for start in range(len(amounts) - 1)]
    partial = [pairs[:count] for count in range(1, len(pairs))] + [overlapping[:count] for count in (2, 3)]
    groups = pairs if draw.random() < COVERING_SHARE else draw.choice(partial)
    return Plan(True, tuple(f"What is {' + '.join(map(str, group))}?" for group in groups))
