r"""Read numbers in text exactly, as decimals. Nothing is rounded and there is no tolerance.

What counts as a number:

- Signs, thousands separators and decimals: 5, -5, −5, –5, .5, 8,000, 1,000,000.50, 8 000, 3.5e2, 1{,}000 (LaTeX).
- A number with a currency, unit or percent sign: $5, 5€, USD 5, 12kg, 5 apples, 50%. These are removed and never
  change the value: 50% is 50, 5k is 5, 2 million is 2.
- A simple or mixed fraction that is a finite decimal: 1/2, 3 1/4, \frac{1}{2}. Other fractions (1/3) are not numbers:
  gold answers are decimals, so such a fraction could never equal one.

What does not count: a lone comma, times (10:30), ratios (3:4), lists and wrong grouping (1,2,3; 12,34; 0,500), dates,
versions (1.2.3), powers (2^3, 2**3), names (COVID-19, x2, 0x10), 1_000, digits of other scripts, ½, 5², √5, 2π, words
(eighteen), NaN, infinity, exponents beyond ±30, more than 40 digits. Ranges and differences (5-7) do not count either:
they are two numbers, and it is not known which one was meant.

Terms used below: a token is a word with everything joined to it (5, 5-7, 10:30). A sign is + or −. An operand is a
number in an expression that was not computed, such as the 6 in 12 + 6.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Context, Decimal, DecimalException, DivisionByZero, Inexact, InvalidOperation

MAX_DIGITS = 40
MAX_EXPONENT = 30
_MAX_TOKEN_CHARS = 120  # longer than any accepted number; longer tokens are rejected without further checks
_MAX_GAP = 60  # most characters between two numbers that an operator joins
# Characters before a number in which its sign is searched. The patterns match at most 5; with one character more, their
# ^ matches only at the real start of the text.
_NEAR = 6


def parse_gold(answer: str) -> Decimal:
    """Return the number after the one `####` of a GSM8K answer.

    Raises:
        ValueError: with a message of one line, if there is no marker, more than one, or no number after it.
    """
    shown = repr(answer if len(answer) <= 80 else "…" + answer[-79:])
    parts = answer.split("####")
    if len(parts) == 1:
        raise ValueError(f"gold answer has no '####' marker (expected '… #### 42'): {shown}")
    if len(parts) > 2:
        raise ValueError(f"gold answer has {len(parts) - 1} '####' markers (expected one): {shown}")
    number = parse_number(parts[1])
    if number is None:
        raise ValueError(f"gold answer has no number after '####' (expected '… #### 42'): {shown}")
    return number


def parse_number(text: str) -> Decimal | None:
    """Return the one number in `text`, or None if there is none, more than one, or other text that is not allowed.

    Only a sign, a currency and light markup may come before the number ("about 5" gives None). A unit or other words
    without numbers may follow it. Never raises; takes linear time. The module's docstring defines a number.
    """
    text = plain(text)
    tokens = _numeric(text)
    if len(tokens) != 1:
        return None
    lead = _LEAD.fullmatch(text, 0, tokens[0].start())
    if lead is None or (lead["sign"] and lead["inner_sign"]):
        return None
    negative = (lead["sign"] or lead["inner_sign"] or "+") != "+"
    return _value(tokens[0][0], negative)


def numbers_in(text: str) -> set[Decimal]:
    """Return all numbers in running text, also those in expressions. Never raises; takes linear time."""
    text = plain(text)
    found = (_signed(text, token) for token in _numeric(text))
    return {number for number in found if number is not None}


def stated_number(text: str) -> Decimal | None:
    """Return the number that a short text states: the one after its last "=", or else its first.

    None if that number is not readable or is an operand: 12 + 6 states no number; 12 + 6 = 18 and 18 = 12 + 6 do.
    Never raises; takes linear time.
    """
    for side in reversed(_EQUALS.split(plain(text))):
        tokens = _numeric(side)
        if tokens and not _is_operand(side, tokens[0]) and not _are_operands(side, tokens[:2]):
            number = parse_number(side)  # also accepts a sign with a space, "- 5"
            return _signed(side, tokens[0]) if number is None else number
    return None


def last_number(text: str) -> Decimal | None:
    """Return the last number in running text. Never raises; takes linear time.

    None if there is no number, or if the last token with digits is not readable or is an operand. How it was computed
    may stand in parentheses at the end: "18 apples (12 + 6)".
    """
    text = plain(text)
    computed = _COMPUTED.search(text)
    if computed is not None:
        text = text[: computed.start()]
    tokens = _numeric(text)
    if not tokens or _is_operand(text, tokens[-1]) or _are_operands(text, tokens[-2:]):
        return None
    return _signed(text, tokens[-1])


def starts_with_number(text: str) -> bool:
    """Return whether `text` starts with a token like a number; a sign, currency and markup may come before it."""
    text = plain(text)
    return _leads(text, _numeric(text))


def without_remarks(statement: str) -> str:
    """Return a statement of a number without the remarks about it: "18, as 20 - 2 = 18", "7 because 3 of 4 = 0.75".

    If a number comes first, only that number is kept, unless it begins an equation: 12 + 6 = 18, 3 dozen = 36,
    20% of 50 = 10.
    """
    text = plain(statement)
    tokens = _numeric(text)
    if _leads(text, tokens):
        equals = _EQUALS.search(text, tokens[0].end())
        term = text[tokens[0].end() : equals.start()] if equals is not None else ""
        equation = (len(term) <= _MAX_GAP and _UNIT.fullmatch(term)) or _are_operands(text, tokens[:2], _PART_OF)
        return text if equals is None or equation else text[: tokens[0].end()]
    reason = _REASON.search(text)
    return text[: reason.start()] if reason is not None and _numeric(text[: reason.start()]) else text


# --- LaTeX and other spellings -------------------------------------------------------------------------------

# With the space before it, so that 3 \\frac{1}{4} becomes the mixed number 3 1/4.
_FRACTION = re.compile(
    r"(?:(?<=[0-9])[ ]\$(?=\\)|[ ~]|\\[ ,;:]){0,3}\\[dtc]?frac[ ]?"
    rf"(?:\{{(-?[0-9]{{1,{MAX_DIGITS}}})\}}\{{([0-9]{{1,{MAX_DIGITS}}})\}}|([0-9])[ ]?([0-9]))"
)
# A unit with a power in text: 18\\text{ cm}^2, 18 m$^2$, 18 cm<sup>2</sup>. Without this, the 2 would be a number.
_UNIT_TEXT = re.compile(r"\\(?:text|math)(?:rm|it|bf)?\{([^{}0-9]{1,40})\}(?=\^)")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])(?:\$\^\{?([23])\}?\$|<sup>([23])</sup>)")
_POWER = re.compile(rf"\^\{{([+-]?[0-9]{{1,{MAX_DIGITS}}})\}}")
_COMMAND = re.compile(
    r"\\(?:(?P<sign>times|cdot|div|approx|pi|sqrt|[dtc]?frac)|text(?:bf|it|rm)?|math(?:bf|it|rm|sf)?|boxed|fbox|left|right"
    r"|q?quad|(?:text)?color\{[a-z]{1,20}\})(?![A-Za-z])|\\(?P<char>[()\[\]{}$%#&_])|\\[ ;:]"
)
# Signs for LaTeX commands. A fraction of anything but plain digits is replaced by √ too, because neither is a number.
_SIGNS = {"times": "×", "cdot": "·", "div": "÷", "approx": "≈", "pi": "π"}
_JOINED = re.compile(r"(?<=[0-9])[ ](?=[π√])")
_NEGATIVE = re.compile(r"(?:\bnegative|(?P<lead>^\s{0,9}|(?<=\bis[ ])|(?<=:[ ]))minus)[ ](?=[$0-9])", re.IGNORECASE)


def plain(text: str) -> str:
    r"""Return `text` with numbers in a plain spelling; replaces 1{,}000, 1\,000, \frac{1}{2}, 10^{6}, negative 5."""
    # JSON turns "\frac" and "\times" into these control characters if the backslash was not escaped.
    text = text.replace("\frac", "\\frac").replace("\times", "\\times")
    text = _UNIT_POWER.sub(r"^\1\2", text.replace("{,}", ","))
    if "\\" in text:
        text = _UNIT_TEXT.sub(r" \1", _FRACTION.sub(r" \1\3/\2\4", text))
        text = text.replace("\\!", "").replace("\\,", ",")
        text = _COMMAND.sub(
            lambda found: _SIGNS.get(found["sign"], "√") if found["sign"] else found["char"] or " ", text
        )
    return _NEGATIVE.sub(r"\g<lead>-", _JOINED.sub("", _POWER.sub(r"^\1", text)))


# --- numbers -------------------------------------------------------------------------------------------------

_CURRENCY = "$€£¥₹₽₩₪₫₱฿₴₺¢＄￥￡"
_CODE = r"(?:USD|US|EUR|GBP|JPY|CNY|INR|CAD|AUD|CHF|Rs)"
_LATIN = r"A-Za-zµÀ-ÖØ-öø-ɏ"  # without × and ÷, and without CJK: 答案是42个 has no spaces around its number
_GREEK = r"Ͱ-Ͽ"
# Characters that belong to the same word as a digit. They include Greek, roots, superscripts, ½ and digits of other
# scripts. So 2π, √2, 5² and 3½ are one word each, which is not a number; otherwise 2, 2, 5 and 3 would be read.
_LETTER = re.compile(rf"[{_LATIN}{_GREEK}]")
_WORD = rf"{_LATIN}\d{_GREEK}\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f√"
_MINUS = r"\-−–﹣－"
_HYPHEN = r"\-‐‑"
_GROUP = ",\u00a0\u2009\u202f"  # no-break and thin spaces always group digits
# A plain space separates numbers (100 200). Exception: a group that starts with 0, which no number does (1 250 000, as
# in GSM8K). Read as separate numbers, the last of these would be 0.
_SPACE_GROUP = r"[ ](?=(?:[0-9]{3}[ ]){0,9}0[0-9]{2}(?![0-9]))"

# A word and everything joined to it: 1,000.5, 10:30, 1.2.3, 5-7, $5-$7, 2^3, COVID-19, 1_000, 1e-5. The whole is one
# number or none. Each part is matched once, without backtracking.
_TOKEN = re.compile(
    rf"""
    (?:[0-9]{{1,{MAX_DIGITS}}}[ \u00a0\u2009\u202f]{{1,2}}(?=[0-9]{{1,{MAX_DIGITS}}}/[0-9]))?  # the 3 of 3 1/4
    (?:(?<![{_WORD}.)\]}}])\.(?=[0-9]))?                              # .5, but not the full stop of "is.5"
    (?P<code>{_CODE}(?=[0-9]))?
    [{_WORD}]++
    (?:
      (?: (?<=[0-9])(?:[.:/'’{_GROUP}]|\*\*|{_SPACE_GROUP})
        | (?<=[0-9])[{_MINUS}{_HYPHEN}—][{_CURRENCY}]?
        | (?<=[{_WORD}])[\^_{_HYPHEN}]
        | (?<=[0-9][eE])\+
      )(?=[0-9])
      [{_WORD}]++
    )*+
    """,
    re.VERBOSE,
)

_NUMBER = re.compile(
    rf"""
    {_CODE}?
    (?: (?:(?P<whole>[0-9]+)[ \u00a0\u2009\u202f]{{1,2}})?(?P<over>[0-9]+)/(?P<under>[0-9]+)
      | (?P<digits> (?:[1-9][0-9]{{0,2}}(?P<group>[{_GROUP} ])[0-9]{{3}}(?:(?P=group)[0-9]{{3}})*|[0-9]+)(?:\.[0-9]+)?
                  | \.[0-9]+ )
        (?:[eE](?P<exponent>[+-]?[0-9]+))?
    )
    (?:[{_LATIN}][{_LATIN}\u00b2\u00b3]*)?  # a unit
    """,
    re.VERBOSE,
)

# What may come before the number in parse_number: a sign, a currency, and some markup.
_MARKUP = r"\s*_\"'`“”‘’(\[{=≈~"
_LEAD = re.compile(
    rf"[{_MARKUP}]*+(?P<sign>[+{_MINUS}])?[{_MARKUP}]*+(?:{_CODE}\.?\s*+)?[{_CURRENCY}]{{0,2}}[{_MARKUP}]*+"
    rf"(?P<inner_sign>[+{_MINUS}])?[{_MARKUP}]*+"
)
# A minus sign directly before a number in running text, or before or after the number's currency. It must not follow
# something from which the number could be subtracted, nor be the second half of a dash. At most 5 characters long.
_SIGN_BEFORE = re.compile(
    rf"(?:^|[^{_WORD})\]}}%{_CURRENCY}{_MINUS}{_HYPHEN}—])[{_CURRENCY}]?[{_MINUS}](?:[{_CURRENCY}][ ]?)?\Z"
    rf"|=[ ]?[{_MINUS}][ ][{_CURRENCY}]?\Z"  # 5 - 8 = - 3
)

# What joins two numbers, or a variable and a number, in an expression that was not computed. A dash after words
# ("12 eggs - 18 in all") is not included, because it may be punctuation; ** is not, because it is Markdown.
_OPERATION = re.compile(
    rf"""
    (?: (?:[^\S\n]*+[{_LATIN}°²³]++){{0,3}}? [)\]}}%{_CURRENCY}]* [^\S\n]*
        (?: [+×·⋅∙÷/^] | (?<=\s)[*xX](?=\s) | (?<![\s*])\*(?![\s*]) | plus | times | divided[ ]by | multiplied[ ]by )
      | [)\]}}%{_CURRENCY}]* (?: [^\S\n]+(?:[{_MINUS}]|minus)[^\S\n]+ | [{_MINUS}] )
    )
    [^\S\n]*[({{\[{_CURRENCY}{_MINUS}+]*[^\S\n]*
    """,
    re.VERBOSE,
)
# What stands directly before an operand: "x + " in x + 5, a root sign, or "}{" before the denominator of a fraction
# that could not be read. At most 5 characters.
_BEFORE_OPERAND = re.compile(rf"(?:[{_LATIN})](?:[ ]?[×·⋅∙÷^][ ]?|\+|[ ][+*][ ])[{_CURRENCY}]?|√[ (\[{{]|[\]}}]\{{)\Z")

# Other ways in which two numbers form one term: 20% of 50, 5 apples at $2.
_PART_OF = re.compile(
    rf"(?:{_OPERATION.pattern}|%[ ]of[ ][{_CURRENCY}]?|(?:[ ][{_LATIN}]+){{0,3}}[ ]at[ ][{_CURRENCY}]?)", re.VERBOSE
)
# An expression in parentheses behind a number and at most three words, at the end of the text.
_COMPUTED = re.compile(
    rf"(?<=[\w%{_CURRENCY}])[ ]\([{_CURRENCY}]?[0-9][^()=+×*/÷{_MINUS}x\n]{{0,60}}[+×*/÷{_MINUS}x][^()=\n]{{0,60}}\)"
    r"\W{0,5}\Z"
)
_UNIT = re.compile(rf"[^\S\n]*+(?:[{_LATIN}²³/]++[^\S\n]*+){{0,3}}[)\]}}%*{_CURRENCY}]*[^\S\n]*")
_EQUALS = re.compile(r"[=≈→]|\bequals\b")
_REASON = re.compile(r"\b(?:because|since)\b", re.IGNORECASE)

# The operators of Decimal round silently to the caller's context (28 digits by default).
_EXACT = Context(prec=400, traps=[Inexact, DivisionByZero, InvalidOperation])


def _numeric(text: str) -> list[re.Match[str]]:
    """Return the tokens of `text` that begin like a number. Those that begin with a letter (m^2, CO2) are names."""
    return [match for match in _TOKEN.finditer(text) if match["code"] or not _LETTER.match(match[0])]


def _leads(text: str, tokens: Sequence[re.Match[str]]) -> bool:
    """Return whether only a sign, a currency and markup come before the first number of `text`."""
    return bool(tokens) and _LEAD.fullmatch(text, 0, tokens[0].start()) is not None


def _are_operands(text: str, pair: Sequence[re.Match[str]], joint: re.Pattern[str] = _OPERATION) -> bool:
    """Return whether an operator joins two neighbouring numbers of `text` (False for a single number)."""
    gap = text[pair[0].end() : pair[1].start()] if len(pair) == 2 else ""
    return 0 < len(gap) <= _MAX_GAP and joint.fullmatch(gap) is not None


def _is_operand(text: str, token: re.Match[str]) -> bool:
    """Return whether a number of `text` forms an expression with the text directly before it, such as x + 5."""
    return _BEFORE_OPERAND.search(text[max(0, token.start() - _NEAR) : token.start()]) is not None


def _signed(text: str, token: re.Match[str]) -> Decimal | None:
    """Return the number that a token of running text stands for, with the sign before it, or None."""
    start = token.start()
    negative = _SIGN_BEFORE.search(text[max(0, start - _NEAR) : start]) is not None
    return _value(token[0], negative)


def _value(token: str, negative: bool) -> Decimal | None:
    """Return the number that a whole token stands for, or None. Its sign was found before it."""
    if len(token) > _MAX_TOKEN_CHARS or not any("0" <= char <= "9" for char in token):
        return None
    match = _NUMBER.fullmatch(token)
    if match is None or max(len(part) for part in re.findall("[0-9]+", token)) > MAX_DIGITS:
        return None
    if match["under"] is not None:
        try:
            value = _EXACT.divide(Decimal(match["over"]), Decimal(match["under"]))
            if match["whole"] is not None:
                if value >= 1:  # "2 5/3" is not a mixed number
                    return None
                value = _EXACT.add(Decimal(match["whole"]), value)
        except DecimalException:  # no finite decimal, or a division by zero
            return None
    else:
        digits = re.sub(f"[{_GROUP} ]", "", match["digits"])
        exponent = int(match["exponent"] or 0)
        if abs(exponent) > MAX_EXPONENT or len(digits.replace(".", "")) > MAX_DIGITS:
            return None
        value = Decimal(f"{digits}e{exponent}")  # the constructor never rounds
    return value.copy_negate() if negative else value  # unary minus rounds to the context
