"""Replace a number of a problem by X, if the new answer can be computed with certainty.

GSM8K's solutions contain their arithmetic as annotations, for example `<<48/2=24>>`. After a number of the question has
been replaced, the annotations can be computed again. That is correct only if it is certain which other numbers depend
on the replaced one. A number is replaced only if all of these conditions hold.

The annotations:

- Every annotation is plain arithmetic and exactly right.
- No line shows more equations than it has annotations.
- The last value is the answer.

The number to replace:

- It is a whole number of at least 2.
- It occurs once in the question, in digits and as an amount: not as a percentage, time, ordinal, fraction or decimal.
- It is used exactly once in the annotations, and no step has it as its result.
- No word of the question may mean this number ("twice", "dozen", "week", "percent", …), and it is not the sum or the
  difference of other numbers in the question ("8 men and 6 women … all 14 men and women").
- The answer depends on it.

The other numbers:

- Each number in the annotations has a known origin: an earlier step, or the question, in digits or as a word. Any
  other number might depend on the replaced one. For example, the six people in "he and five friends" do so.
- No number has two possible origins of which only one depends on the replaced number.

Thresholds and comparisons: the question has no word for one ("over", "at least", "the first", "cheapest"). A new number
might be on the other side of the threshold.

With the new number, every result must be above 0, and a result that was a whole number must stay one.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import combinations

from common.grading import parse_gold

VARIABLE = "X"

_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_DIGITS = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
_AMOUNT = re.compile(
    r"(?<![\w.,:/^*+-])(\d{1,3}(?:,\d{3})+|\d+)(?![\w%:/^*+]|[.,]\d|-\d| ?(?:%|percent)| ?[ap]\.?m\b| o['’]clock)",
    re.IGNORECASE,
)
_NAMES = re.compile(r"\b(?:grade|room|page|chapter|level|bus|route|highway|line|number|no\.)\s*\Z", re.IGNORECASE)
_PLAIN = re.compile(r"[\d.+\-*/() ]+")
_ADJECTIVES = (
    r"(?:larg|bigg|small|high|low|long|short|slow|fast|quick|busi|young|old|tall|heavi|light|near|farth|earli|lat)"
)
_DECIDES = re.compile(
    rf"\b(most|least|maximum|minimum|fewest|best|better|worst|cheape\w+|{_ADJECTIVES}est|the {_ADJECTIVES}er(?! than)|"
    r"round\w*|nearest|whole|whichever|exceed\w*|limit|until|unless|remainder|over|under|above|below|within|beyond|"
    r"up to|(?:more|less|fewer|greater) than (?:or|\$?\d[\d,.]*)|the first|the next|(?:each|every) additional|free|"
    r"either)\b",
    re.IGNORECASE,
)
# Words of a question that may mean a number of its solution.
_WORDS: dict[int, str] = {
    2: r"two|twice|doubl\w+|half|halves|couple|pair\w*|both|second|biweekly",
    3: r"three|thrice|tripl\w+|thirds?",
    4: r"four|fourths?|quarters?|quadrupl\w+",
    5: r"five|fifths?|weekdays?|nickels?",
    6: r"six|sixths?",
    7: r"seven|sevenths?|weeks?|weekly|daily",
    8: r"eight|eighths?",
    9: r"nine|ninths?",
    10: r"ten|tenths?|dimes?|decades?",
    11: r"eleven",
    12: r"twelve|dozens?|years?|yearly|annual\w*|months?|foot|feet|inch\w*",
    20: r"twenty|score",
    24: r"days?|hours?",
    25: r"quarters?",
    30: r"thirty|months?",
    50: r"fifty|half",
    52: r"years?|yearly|weeks?",
    60: r"sixty|hours?|minutes?|seconds?",
    100: r"hundreds?|percent\w*|cents?|dollars?|meters?|centur\w+",
    365: r"years?|days?|daily",
    1000: r"thousands?|kilo\w*|grams?|meters?",
}
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True, slots=True)
class _Step:
    """An annotation: its numbers in order, the formula with placeholders (`n0/n1`), and the result."""

    numbers: tuple[Fraction, ...]
    formula: str
    value: Fraction

    def result(self, numbers: tuple[Fraction, ...]) -> Fraction | None:
        """The result with other numbers; None if it cannot be computed."""
        try:
            return _evaluated(ast.parse(self.formula, mode="eval").body, numbers)
        except (ValueError, SyntaxError, ZeroDivisionError, RecursionError):
            return None

    def written(self, numbers: tuple[Fraction, ...], value: Fraction) -> str:
        """The step as a line of a solution."""
        parts = iter(map(_shown, numbers))
        formula = re.sub(r"n\d+", lambda _: next(parts), self.formula)
        return f"{formula} = <<{formula}={_shown(value)}>>{_shown(value)}"


@dataclass(frozen=True, slots=True)
class Slot:
    """A number of a problem that can be replaced: its position in the question, and the steps of the solution."""

    question: str
    start: int
    end: int
    number: int
    steps: tuple[_Step, ...]

    def text(self, shown: str) -> str:
        """The question with `shown` in place of the number."""
        return self.question[: self.start] + shown + self.question[self.end :]

    def answer(self, number: int) -> str | None:
        """The solution with another number, ending in `#### N`; None if a result is not plausible (see the module)."""
        values: list[Fraction] = []
        lines = []
        for step in self.steps:
            numbers = tuple(self._new(old, number, values) for old in step.numbers)
            if any(new is None for new in numbers):
                return None
            known = tuple(new for new in numbers if new is not None)
            value = step.result(known)
            if value is None or value <= 0 or not _finite(value):
                return None
            if step.value.denominator == 1 and value.denominator != 1:
                return None
            values.append(value)
            lines.append(step.written(known, value))
        return "\n".join([*lines, f"#### {_shown(values[-1])}"])

    def _new(self, old: Fraction, number: int, values: list[Fraction]) -> Fraction | None:
        """The new value of the number `old` in a step; None if its origin is not certain."""
        if old == self.number:
            return Fraction(number)
        found = {new for step, new in zip(self.steps, values, strict=False) if step.value == old}
        if old in _in_digits(self.question) or _said(self.question, old):
            found.add(old)
        return found.pop() if len(found) == 1 else None


def slots(question: str, answer: str) -> list[Slot]:
    """The numbers of a problem that can be replaced, in their order. The module's docstring gives the conditions."""
    steps = _steps(answer)
    if steps is None or _DECIDES.search(question) or re.search(rf"\b{VARIABLE}\b", question):
        return []
    digits = _in_digits(question)
    results: set[Fraction] = set()
    for step in steps:
        if any(n not in digits and n not in results and not _said(question, n) for n in step.numbers):
            return []
        results.add(step.value)
    used = [number for step in steps for number in step.numbers]
    found = []
    for match in _AMOUNT.finditer(question):
        number = int(match[1].replace(",", ""))
        once = digits.count(Fraction(number)) == 1 and used.count(Fraction(number)) == 1
        if number < 2 or not once or number in results or _said(question, Fraction(number)):
            continue
        if _NAMES.search(question[: match.start(1)]) or _follows(Fraction(number), digits):
            continue
        slot = Slot(question, match.start(1), match.end(1), number, steps)
        if _depends(slot):
            found.append(slot)
    return found


def _follows(number: Fraction, digits: Sequence[Fraction]) -> bool:
    """Whether a number is the sum or the difference of others in the question, which then say it too."""
    others = [other for other in digits if other != number]
    pairs = ((a, b) for a, b in combinations(others, 2))
    return number == sum(others) or any(number in (a + b, abs(a - b)) for a, b in pairs)


def _depends(slot: Slot) -> bool:
    """Whether the last step uses the number, directly or through earlier steps."""
    touched: set[Fraction] = {Fraction(slot.number)}
    for step in slot.steps:
        if touched & set(step.numbers):
            touched.add(step.value)
    return slot.steps[-1].value in touched


def _steps(answer: str) -> tuple[_Step, ...] | None:
    """The annotations of a solution; None if they are incomplete or inexact, or do not end in the answer."""
    solution, _, _ = answer.partition("####")
    found = []
    for line in solution.splitlines():
        annotations = _ANNOTATION.findall(line)
        if "<<" in _ANNOTATION.sub("", line) or _ANNOTATION.sub("", line).count("=") > len(annotations):
            return None
        for formula, value in annotations:
            step = _step(formula, value)
            if step is None:
                return None
            found.append(step)
    gold = Fraction(parse_gold(answer))
    return tuple(found) if found and found[-1].value == gold and gold.denominator == 1 else None


def _step(formula: str, value: str) -> _Step | None:
    if not _PLAIN.fullmatch(formula) or not re.fullmatch(r"\d+(\.\d+)?|\.\d+", value.strip()):
        return None
    numbers = tuple(Fraction(Decimal(number)) for number in re.findall(r"\d+\.?\d*|\.\d+", formula))
    count = iter(range(len(numbers)))
    named = re.sub(r"\d+\.?\d*|\.\d+", lambda _: f"n{next(count)}", formula).replace(" ", "")
    step = _Step(numbers, named, Fraction(Decimal(value.strip())))
    return step if len(numbers) > 1 and step.result(numbers) == step.value else None


def _evaluated(node: ast.expr, numbers: tuple[Fraction, ...]) -> Fraction:
    if isinstance(node, ast.Name):
        return numbers[int(node.id[1:])]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluated(node.left, numbers), _evaluated(node.right, numbers)
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError(f"{type(node).__name__} is no plain arithmetic")


@lru_cache(maxsize=2**15)  # asked anew for each first problem that a problem is tried behind
def _in_digits(question: str) -> tuple[Fraction, ...]:
    """The numbers that a question contains in digits. A percentage counts twice: as 20 and as 0.2, for example."""
    return tuple(number for match in _DIGITS.finditer(question) for number in _read(question, match))


def _read(question: str, match: re.Match[str]) -> Iterator[Fraction]:
    number = Fraction(Decimal(match[0].replace(",", "")))
    yield number
    if re.match(r" ?(%|percent)", question[match.end() :]):
        yield number / 100


def _said(question: str, number: Fraction) -> bool:
    """Whether a word of the question may mean this number. For 1 no word is needed."""
    if number == 1:
        return True
    words = _WORDS.get(int(number)) if number.denominator == 1 else None
    shares = {Fraction(1, 2): "half|halves", Fraction(1, 4): "quarters?|fourths?"}
    words = words or shares.get(number)
    if number == 100 and "%" in question:
        return True
    return words is not None and re.search(rf"\b({words})\b", question, re.IGNORECASE) is not None


def _finite(number: Fraction) -> bool:
    """Whether a number is a finite decimal."""
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _shown(number: Fraction) -> str:
    return f"{(Decimal(number.numerator) / Decimal(number.denominator)).normalize():f}"
