"""Composed questions, made of several problems of another source.

The source is named `multi:SOURCE?parts=2-3&single=0.3&max_steps=3&kind=sum`. A composed question looks like this:

    (A) Ann has 3 pens and buys 2. How many has she?
    (B) Bob reads 4 pages a day. How many does he read in 5 days?
    What is the sum of the answers to (A) and (B)?

A small model solves such a question far less often than its problems one by one (REST, arXiv:2507.10541; Compositional
GSM, arXiv:2410.01748). So a planner can improve the result here. With `kind=chained` the second problem uses the
answer to the first. `common.problems.chained` explains which problems allow that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from common.errors import UserError
from common.grading import parse_gold
from common.plans import MAX_SUBPROBLEMS
from common.problems import chained, generated
from common.problems.files import Question

PREFIX = "multi:"
GENERATORS = (generated.PREFIX, generated.REASONING_GYM)  # how the names of sources that are not read begin
SINGLE, SUM, CHAINED = "single", "sum", "chained"
LETTERS = "ABCDEFGH"
EXAMPLE = f"{PREFIX}SOURCE?parts=2-3&single=0.3&max_steps=3&kind={SUM}"

OPTIONS = ("parts", "single", "max_steps", "kind")
_CHAINED_END = f"{chained.VARIABLE} in (B) is the answer to (A). What is the answer to (B)?"
_PART = re.compile(r"^\(([A-H])\) ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to compose questions.

    Attributes:
        source: name of the source of the problems.
        fewest, most: number of problems in a composed question, at least and at most.
        single: share in [0, 1] of problems that are not composed.
        max_steps: problems whose solution has more lines than this are left out.
        kind: "sum" or "chained".
    """

    source: str
    fewest: int = 2
    most: int = 2
    single: float = 0.0
    max_steps: int | None = None
    kind: str = SUM


def is_composed(dataset: str) -> bool:
    """Whether a source composes its questions of several problems."""
    return dataset.startswith(PREFIX)


def inner_source(dataset: str) -> str:
    """The source of the problems: SOURCE for `multi:SOURCE?…`, and the name itself for any other source."""
    return parse_source(dataset).source if is_composed(dataset) else dataset


def parse_source(dataset: str) -> Recipe:
    """Read the recipe in a name `multi:SOURCE?parts=2-3&…`. Options that a recipe does not have belong to SOURCE.

    Raises:
        UserError: if SOURCE is missing, an option is unknown or given twice, or has an invalid value.
    """
    source, _, query = dataset.removeprefix(PREFIX).partition("?")
    given = generated.query_options(dataset, query)
    values = {name: value for name, value in given.items() if name in OPTIONS}
    inner = {name: value for name, value in given.items() if name not in OPTIONS}
    others = "&".join(f"{name}={value}" for name, value in inner.items())
    if others and ":" not in source:  # only a generator takes options
        raise _refused(dataset, f"found {others}, the options are {', '.join(OPTIONS)}")
    unknown = next((name for name in inner if name not in generated.OPTIONS), None)
    if unknown is not None and source.startswith(generated.PREFIX):
        theirs = ", ".join(generated.OPTIONS)
        why = f"found {unknown}={inner[unknown]}, the options are {', '.join(OPTIONS)}, and of {source} {theirs}"
        raise _refused(dataset, why)
    if not source or is_composed(source):
        raise _refused(dataset, "a source of problems has to be named, and no composed one")
    parts = re.fullmatch(r"([2-9])(?:-([2-9]))?", values.get("parts", "2"))
    limit = min(len(LETTERS), MAX_SUBPROBLEMS)
    fewest, most = (int(parts[1]), int(parts[2] or parts[1])) if parts else (0, 0)
    if not 2 <= fewest <= most <= limit:
        raise _refused(dataset, f"parts={values['parts']} must be a number from 2 to {limit}, or a range such as 2-3")
    single = values.get("single", "0")
    if not re.fullmatch(r"0|0?\.\d+|0\.0*", single):
        raise _refused(dataset, f"single={single} must be a share from 0 to below 1")
    steps = values.get("max_steps")
    if steps is not None and not re.fullmatch(r"[1-9]\d{0,3}", steps):
        raise _refused(dataset, f"max_steps={steps} must be a whole number from 1")
    kind = values.get("kind", SUM)
    if kind not in (SUM, CHAINED):
        raise _refused(dataset, f"kind={kind} must be {SUM} or {CHAINED}")
    if kind == CHAINED and most > 2:
        raise _refused(dataset, f"kind={CHAINED} takes two problems: leave parts out")
    if kind == CHAINED and source.startswith(GENERATORS):
        raise _refused(dataset, f"kind={CHAINED} needs solutions annotated as GSM8K's are, and generated ones are not")
    whole = f"{source}?{others}" if others else source
    return Recipe(whole, fewest, most, float(single), None if steps is None else int(steps), kind)


def compose(problems: Sequence[Question], recipe: Recipe, limit: int, seed: int, *, shuffle: bool) -> list[Question]:
    """Compose at most `limit` questions. The same seed gives the same questions, and no problem is used twice.

    Args:
        problems: of the source. Repeated texts and too long ones are left out.
        recipe: how to compose.
        limit: largest number of questions.
        seed: of the random choices and the order.
        shuffle: whether to shuffle the problems first.
    """
    draw = random.Random(seed)
    usable = {item.question: item for item in problems if _usable(item, recipe)}
    left = list(usable.values())
    if shuffle:
        draw.shuffle(left)
    made = _chain(left, recipe, draw) if recipe.kind == CHAINED else _sum(left, recipe, draw)
    return [item for item, _ in zip(made, range(limit), strict=False)]


def _usable(item: Question, recipe: Recipe) -> bool:
    return (recipe.max_steps is None or item.steps <= recipe.max_steps) and count_parts(item.question) == 0


def _sum(left: list[Question], recipe: Recipe, draw: random.Random) -> Iterator[Question]:
    place = 0
    while place < len(left):
        single = draw.random() < recipe.single
        count = 1 if single else draw.randint(recipe.fewest, recipe.most)
        taken = left[place : place + count]
        place += count
        if len(taken) == count:
            yield as_single(taken[0]) if single else summed(taken)


def _chain(left: list[Question], recipe: Recipe, draw: random.Random) -> Iterator[Question]:
    """Pair each problem with the next one that can use its answer. A problem without such a partner is skipped."""
    second = {item.question: chained.slots(item.question, item.answer) for item in left}
    if not any(second.values()):
        return  # each problem would be compared with all others in vain
    failed: set[tuple[str, Decimal]] = set()  # second problems, each with a first answer that it cannot use
    waiting = left
    while waiting:
        first, *waiting = waiting
        if draw.random() < recipe.single:
            yield as_single(first)
            continue
        gold = parse_gold(first.answer)
        for place, other in enumerate(waiting):
            if not second[other.question] or (other.question, gold) in failed:
                continue
            found = _chained(first, other, second[other.question])
            if found is not None:
                del waiting[place]
                yield found
                break
            failed.add((other.question, gold))


def as_single(item: Question) -> Question:
    """A problem that is not composed, for a data set that also contains composed questions."""
    return Question(item.question, item.answer, SINGLE)


def summed(parts: Sequence[Question]) -> Question:
    """Compose one question that asks for the sum of the answers to several problems."""
    golds = [parse_gold(part.answer) for part in parts]
    added = " + ".join(map(_shown, golds))
    total = _shown(sum(golds, Decimal(0)))
    solution = [*_solutions(parts), f"{added} = <<{added.replace(' ', '')}={total}>>{total}", f"#### {total}"]
    return Question(sum_text([part.question for part in parts]), "\n".join(solution), SUM, tuple(parts))


def chain(first: Question, second: Question) -> Question | None:
    """Compose one question whose second problem uses the answer to the first; None if its answer is not certain."""
    return _chained(first, second, chained.slots(second.question, second.answer))


def _chained(first: Question, second: Question, slots: Sequence[chained.Slot]) -> Question | None:
    gold = parse_gold(first.answer)
    if gold < 2 or gold != int(gold):
        return None
    for slot in slots:
        answer = slot.answer(int(gold)) if gold != slot.number else None
        if answer is not None:
            told = Question(slot.text(str(int(gold))), answer, source=second.question)
            solution = [*_solutions([first, told]), f"#### {_shown(parse_gold(answer))}"]
            text = chained_text(first.question, slot.text(chained.VARIABLE))
            return Question(text, "\n".join(solution), CHAINED, (first, told))
    return None


def sum_text(problems: Sequence[str]) -> str:
    """Text of the question that asks for the sum of the answers to several problems."""
    named = [f"({letter})" for letter in LETTERS[: len(problems)]]
    asked = f"What is the sum of the answers to {', '.join(named[:-1])} and {named[-1]}?"
    return "\n".join([*_marked(problems), asked])


def chained_text(first: str, second: str) -> str:
    """Text of the question whose second problem uses the answer to the first, under the name X."""
    return "\n".join([*_marked([first, second]), _CHAINED_END])


def count_parts(question: str) -> int:
    """Number of problems in a composed question, found from its text alone; 0 for any other question."""
    letters = "".join(_PART.findall(question))
    return len(letters) if len(letters) > 1 and LETTERS.startswith(letters) and question.startswith("(A) ") else 0


def is_chained(question: str) -> bool:
    """Whether the second problem of a composed question uses the answer to the first, found from its text alone."""
    return question.endswith(_CHAINED_END)


def part_texts(question: str) -> list[str]:
    """The problems of a composed question, as they stand in its text."""
    body = question.rpartition("\n")[0]
    return [part.strip() for part in _PART.split(body)[2::2]]


def by_reference(letter: str) -> str:
    """A subproblem that refers to a part by its letter and does not repeat its text."""
    return f"What is the answer to ({letter})?"


def _marked(problems: Sequence[str]) -> list[str]:
    return [f"({letter}) {text.strip()}" for letter, text in zip(LETTERS, problems, strict=False)]


def _solutions(parts: Sequence[Question]) -> list[str]:
    return [
        f"({letter}) {part.answer.partition('####')[0].strip()}" for letter, part in zip(LETTERS, parts, strict=False)
    ]


def _shown(number: Decimal) -> str:
    return f"{number.normalize():f}"


def _refused(dataset: str, why: str) -> UserError:
    return UserError(f"--dataset {dataset}: {why}: write {EXAMPLE}")
