"""Numbers that a text tells in another way than by digits: in words, and as arithmetic that is left to compute.

The grader does not read these: an answer must be a number. They matter where a planner must not tell the answer to the
worker (`common.pipeline`). "forty-two" and "6 * 7" tell 42 as well as the digits do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction

from common.grading.numbers import MAX_DIGITS, plain

MAX_TERMS = 32  # of one expression; exact arithmetic on more of them could take long
MAX_DECIMALS = 30

# fmt: off
_SMALL = {
    word: value
    for value, word in enumerate((
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    ))
}
# fmt: on
_SMALL |= {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_NO_LARGE = 10**12
_WORDS = frozenset({*_SMALL, *_LARGE, "hundred"})

_WORD = re.compile(r"[A-Za-z]++")
# Between two words of one number: "forty-two"; after a large one also "one hundred and five", "one thousand, two".
_JOINT = re.compile(r"[ \-‐‑]")
_JOINT_OF_LARGE = re.compile(r"[ \-‐‑]|,? and |, ", re.IGNORECASE)

_DIGITS = rf"[0-9]{{1,{MAX_DIGITS}}}+"
_TERM = re.compile(
    rf"""
    (?P<number> (?: (?:[0-9]{{1,3}}(?:,[0-9]{{3}})++(?![0-9])|{_DIGITS}) (?:\.{_DIGITS})?+ | \.{_DIGITS} ) (?![0-9]) )
    | (?P<operator> [+×·⋅∙÷/\-−–] | \*(?!\*) | [xX](?=[ ]?[0-9($]) | plus\b | minus\b | times\b
                  | (?:multiplied|divided)[ ]by\b )
    | (?P<bracket> [()] )
    | (?P<unit> (?<=[0-9][ ])(?:[A-Za-z]{{1,20}}[ ]){{1,3}}(?=[+×·⋅∙÷/*−]|-[ ]|(?:plus|minus|times)\b) )
    | (?P<skipped> [\s$€£]++ )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_OPERATORS = {"×": "*", "·": "*", "⋅": "*", "∙": "*", "x": "*", "times": "*", "multiplied by": "*"}
_OPERATORS |= {"÷": "/", "divided by": "/", "−": "-", "–": "-", "minus": "-", "plus": "+"}
_PRIORITY = {"+": 1, "-": 1, "*": 2, "/": 2}


def numbers_in_words(text: str) -> set[Decimal]:
    """Whole numbers that are written in English words: "forty-two", "one hundred and five".

    Never raises; takes linear time.
    """
    return {Decimal(value) for _, _, value in _spelled(text)}


def values_in(text: str) -> set[Decimal]:
    """Values of all arithmetic expressions in a text, of digits or words: 42 in "6 * 7" and in "six times seven".

    An expression has at least two numbers and at most `MAX_TERMS` terms, joined by plus, minus, times or divided by,
    with or without parentheses. Up to three words may follow a number: "6 boxes * 7 pens a box". Only its
    whole value is in the set, not those of its parts. Values that are no finite decimal are left out.

    Never raises; takes linear time.
    """
    found = set()
    for terms in _runs(_in_digits(plain(text))):
        value = _value(terms) if len(terms) <= MAX_TERMS else None
        if value is not None:
            found.add(value)
    return found


def _spelled(text: str) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, value) for each number in words."""
    words: list[re.Match[str]] = []
    for word in _WORD.finditer(text):
        if word[0].lower() not in _WORDS:
            continue
        if words:
            joint = _JOINT if words[-1][0].lower() in _SMALL else _JOINT_OF_LARGE
            if joint.fullmatch(text, words[-1].end(), word.start()) is None:
                yield from _numbers(words)
                words = []
        words.append(word)
    yield from _numbers(words)


def _numbers(words: Sequence[re.Match[str]]) -> Iterator[tuple[int, int, int]]:
    """Numbers in a row of number words. Words that cannot belong to one number begin the next: "one two" is 1 and 2."""
    total = group = end = 0
    start: int | None = None
    smallest = _NO_LARGE  # the next "thousand" or "million" must be smaller
    for word in words:
        name = word[0].lower()
        fits = start is not None and _fits(name, group, smallest)
        if start is not None and not fits:
            yield start, end, total + group
            total, group, start, smallest = 0, 0, None, _NO_LARGE
        if name in _SMALL:
            group += _SMALL[name]
        elif name == "hundred":
            group = max(group, 1) * 100
        else:
            total += max(group, 1) * _LARGE[name]
            group, smallest = 0, _LARGE[name]
        start, end = word.start() if start is None else start, word.end()
    if start is not None:
        yield start, end, total + group


def _fits(name: str, group: int, smallest: int) -> bool:
    """Whether a number word can continue a number whose last group, below a thousand, is `group` so far."""
    if name in _LARGE:
        return group > 0 and _LARGE[name] < smallest
    if name == "hundred":
        return 0 < group < 10
    value = _SMALL[name]
    room = group % 100
    return value > 0 and (room == 0 if value >= 10 else room == 0 or (room >= 20 and room % 10 == 0))


def _in_digits(text: str) -> str:
    """The text with number words as digits."""
    pieces, place = [], 0
    for start, end, value in _spelled(text):
        pieces += [text[place:start], str(value)]
        place = end
    return "".join([*pieces, text[place:]])


def _runs(text: str) -> Iterator[list[str]]:
    """Yield the longest rows of numbers, operators and parentheses, each as a list of terms."""
    terms: list[str] = []
    place = 0
    for term in _TERM.finditer(text):
        if term.start() > place and terms:
            yield terms
            terms = []
        place = term.end()
        if term["number"]:
            terms.append(term["number"].replace(",", ""))
        elif term["operator"]:
            sign = " ".join(term["operator"].lower().split())
            terms.append(_OPERATORS.get(sign, sign))
        elif term["bracket"]:
            terms.append(term["bracket"])
    if terms:
        yield terms


def _value(terms: Sequence[str]) -> Decimal | None:
    """The value of an expression of two numbers or more; None if it is none. (Dijkstra's shunting-yard algorithm.)"""
    terms = _trimmed(terms)
    values: list[Fraction] = []
    waiting: list[str] = []
    expects_number = True
    for term in terms:
        if term in _PRIORITY:
            if expects_number:
                return None
            while waiting and waiting[-1] != "(" and _PRIORITY[waiting[-1]] >= _PRIORITY[term]:
                if not _apply(waiting.pop(), values):
                    return None
            waiting.append(term)
            expects_number = True
        elif term == ")":
            while waiting and waiting[-1] != "(":
                if not _apply(waiting.pop(), values):
                    return None
            if expects_number or not waiting:
                return None
            waiting.pop()
        elif not expects_number:
            return None
        elif term == "(":
            waiting.append(term)
        else:
            values.append(Fraction(term))
            expects_number = False
    while waiting:
        if waiting[-1] == "(" or not _apply(waiting.pop(), values):
            return None
    return _decimal(values[0]) if len(values) == 1 and sum(term in _PRIORITY for term in terms) else None


def _trimmed(terms: Sequence[str]) -> Sequence[str]:
    """The terms without what belongs to no expression at both ends: operators, and parentheses without a partner.

    "(see 6 * 7)", "- 6 * 7" and "6 * 7 (…" are a remark, an item of a list, and an expression before a remark.
    """
    start, end = 0, len(terms)
    while start < end and (terms[start] in _PRIORITY or terms[start] == ")"):
        start += 1
    while start < end and (terms[end - 1] in _PRIORITY or terms[end - 1] == "("):
        end -= 1
    surplus = terms[start:end].count("(") - terms[start:end].count(")")
    while surplus > 0 and terms[start] == "(":
        start, surplus = start + 1, surplus - 1
    while surplus < 0 and terms[end - 1] == ")":
        end, surplus = end - 1, surplus + 1
    return terms[start:end]


def _apply(operator: str, values: list[Fraction]) -> bool:
    """Replace the last two values by the operator's result; False if there is none."""
    if len(values) < 2 or (operator == "/" and values[-1] == 0):
        return False
    right, left = values.pop(), values.pop()
    results = {"+": left + right, "-": left - right, "*": left * right}
    values.append(left / right if operator == "/" else results[operator])
    return True


def _decimal(value: Fraction) -> Decimal | None:
    """The value as an exact decimal; None if it is no finite one."""
    rest, digits = value.denominator, 0
    for factor in (2, 5):
        count = 0
        while rest % factor == 0:
            rest, count = rest // factor, count + 1
        digits = max(digits, count)
    if rest != 1 or digits > MAX_DECIMALS:
        return None
    return Decimal(f"{value.numerator * 10**digits // value.denominator}e-{digits}")  # the constructor never rounds
