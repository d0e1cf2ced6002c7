r"""Grading: the number in a gold answer, the number in a worker's text, and whether they are equal.

Numbers are compared exactly, as decimals; nothing is rounded and there is no tolerance. What counts as a number:

- Signs, thousands separators and decimals: 5, -5, −5, –5, .5, 8,000, 1,000,000.50, 8 000, 3.5e2, 1{,}000 (LaTeX).
- With a currency, unit or percent sign around it: $5, 5€, USD 5, 12kg, 5 apples, 50%. These are dropped and never
  rescale: 50% is 50, 5k is 5, 2 million is 2.
- A simple or mixed fraction that is a finite decimal: 1/2, 3 1/4, \frac{1}{2}. Others (1/3) are no number: as golds
  are decimals, they could not be equal to one.
- Not a number: a lone comma, times (10:30), ratios (3:4), lists and bad grouping (1,2,3; 12,34; 0,500), ranges and
  differences (5-7: two numbers, and no telling which was meant), dates, versions (1.2.3), powers (2^3), names
  (COVID-19, x2, 0x10), 1_000, NaN, infinity, exponents beyond ±30, more than 40 digits.
"""

from __future__ import annotations

import re
from decimal import Context, Decimal, DecimalException, DivisionByZero, Inexact, InvalidOperation

from common.plans import JsonNumber, json_objects

MAX_DIGITS = 40
MAX_EXPONENT = 30
_MAX_TOKEN_CHARS = 120  # longer than any accepted number, so that no long token is looked at closely


def parse_gold(answer: str) -> Decimal:
    """Return the number after the one `####` of a GSM8K answer.

    Raises ValueError, with a message of one line, if there is no marker, more than one, or no number after it.
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
    """Return the one number that `text` writes, or None if it writes none, several, or something more.

    Before the number only a sign, a currency and light markup may stand ("about 5" is None); after it, a unit or
    other words without numbers. Never raises; linear time. See the module's docstring for what a number is.
    """
    text = _plain(text)
    # Words that start with a letter (m^2, CO2) are units or names; more than one token with a digit in front is not
    # one number.
    tokens = [match for match in _TOKEN.finditer(text) if match[0][0] in "0123456789." or match["code"]]
    if len(tokens) != 1:
        return None
    token = tokens[0]
    lead = _LEAD.fullmatch(text, 0, token.start())
    if lead is None or (lead["sign"] and lead["inner_sign"]):
        return None
    negative = (lead["sign"] or lead["inner_sign"] or "+") != "+"
    return _value(token[0], negative)


def extract_prediction(text: str) -> Decimal | None:
    """Return the number a worker's text gives as its answer, or None. Never raises; linear time.

    The `final_answer` of the last JSON object that has one decides alone: a number, or a string that is a number
    or has one (then its last). If it holds no number (null, true, a list, "unknown", NaN), the worker gave no
    answer, and it is not looked for elsewhere: that would pay for a number picked from its notes. Without such a
    field it is the last number in the text, which is also where `#### 42` and `\\boxed{42}` put it.
    """
    answers = [found["final_answer"] for found in json_objects(text) if "final_answer" in found]
    if not answers:
        return _only_or_last_number(text)
    answer = answers[-1]
    if isinstance(answer, JsonNumber):
        return parse_number(answer.text)
    if isinstance(answer, str):
        return _only_or_last_number(answer)
    return None


def is_correct(prediction_text: str, gold: Decimal) -> bool:
    """Return whether the answer in a worker's text is exactly equal to `gold`. Never raises; linear time."""
    prediction = extract_prediction(prediction_text)
    return prediction is not None and prediction == gold


# --- reading numbers -----------------------------------------------------------------------------------------

_CURRENCY = "$€£¥₹₽₩₪₫₱฿₴₺¢＄￥￡"
_CODE = r"(?:USD|US|EUR|GBP|JPY|CNY|INR|CAD|AUD|CHF|Rs)"
_LATIN = r"A-Za-zµÀ-ÖØ-öø-ɏ"  # without × and ÷; no CJK: 答案是42个 has no spaces around its number
# Characters that belong to a number's word. Greek, roots, superscripts and ½ are there so that 2π, √2, 5² and 3½
# are one word (which is no number) and not 2, 2, 5 and 3; other scripts' digits for the same reason.
_WORD = rf"{_LATIN}\dͰ-Ͽ\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f√"
_MINUS = r"\-−–﹣－"
_HYPHEN = r"\-‐‑"
_GROUP = ",\u00a0\u2009\u202f"  # no-break and thin spaces always group digits
# A plain space separates numbers (100 200), except where a group starts with 0, as no number of its own does: 1 250 000
# (GSM8K has such). Read as two numbers, the last of these would be 0.
_SPACE_GROUP = r"[ ](?=(?:[0-9]{3}[ ]){0,9}0[0-9]{2}(?![0-9]))"

# A word, together with what is joined to it: 1,000.5, 10:30, 1.2.3, 5-7, $5-$7, 2^3, COVID-19, 1_000, 1e-5. All of it
# is read as one number or as none. Each part is matched once, without backtracking.
_TOKEN = re.compile(
    rf"""
    (?:[0-9]{{1,{MAX_DIGITS}}}[ ](?=[0-9]{{1,{MAX_DIGITS}}}/[0-9]))?  # the 3 of 3 1/4
    (?:(?<![{_WORD}.)\]}}])\.(?=[0-9]))?                              # .5, but not the full stop of "is.5"
    (?P<code>{_CODE}(?=[0-9]))?
    [{_WORD}]++
    (?:
      (?: (?<=[0-9])(?:[.:/'’{_GROUP}]|{_SPACE_GROUP})
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
    (?: (?:(?P<whole>[0-9]+)[ ])?(?P<over>[0-9]+)/(?P<under>[0-9]+)
      | (?P<digits> (?:[1-9][0-9]{{0,2}}(?P<group>[{_GROUP} ])[0-9]{{3}}(?:(?P=group)[0-9]{{3}})*|[0-9]+)(?:\.[0-9]+)?
                  | \.[0-9]+ )
        (?:[eE](?P<exponent>[+-]?[0-9]+))?
    )
    (?:[{_LATIN}][{_LATIN}\u00b2\u00b3]*)?  # a unit
    """,
    re.VERBOSE,
)

# What may stand before the number in parse_number: a sign, a currency, and some markup.
_MARKUP = r"\s*_\"'`(\[{=≈~"
_LEAD = re.compile(
    rf"[{_MARKUP}]*+(?P<sign>[+{_MINUS}])?[{_MARKUP}]*+(?:{_CODE}\.?\s*+)?(?:\\?[{_CURRENCY}])?[{_MARKUP}]*+"
    rf"(?P<inner_sign>[+{_MINUS}])?[{_MARKUP}]*+"
)
# A minus right before a number in running text, or before its currency: not one that follows something it could
# be subtracted from, nor the second half of a dash. At most 5 characters long.
_SIGN_BEFORE = re.compile(rf"(?:^|[^{_WORD})\]}}%{_CURRENCY}{_MINUS}{_HYPHEN}—])[{_MINUS}](?:\\?[{_CURRENCY}][ ]?)?\Z")

_FRACTION = re.compile(rf"\\[dt]?frac\{{([0-9]{{1,{MAX_DIGITS}}})\}}\{{([0-9]{{1,{MAX_DIGITS}}})\}}")

# Decimal's own operators round to the caller's context (28 digits unless changed), silently.
_EXACT = Context(prec=400, traps=[Inexact, DivisionByZero, InvalidOperation])


def _plain(text: str) -> str:
    r"""Return `text` with LaTeX's ways to write a number in plain form: 1{,}000, 1\,000, 1,\!000, \frac{1}{2}."""
    if "\\" in text or "{,}" in text:
        text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", ",")
        text = _FRACTION.sub(r" \1/\2", text)
    return text


def _only_or_last_number(text: str) -> Decimal | None:
    """Return the one number that `text` is, else the last number in it, else None."""
    number = parse_number(text)
    return _last_number(text) if number is None else number


def _last_number(text: str) -> Decimal | None:
    """Return the last number in running text, or None."""
    text = _plain(text)
    for match in reversed(list(_TOKEN.finditer(text))):
        start = match.start()
        negative = _SIGN_BEFORE.search(text[max(0, start - 6) : start]) is not None
        number = _value(match[0], negative)
        if number is not None:
            return number
    return None


def _value(token: str, negative: bool) -> Decimal | None:
    """Return the number that a whole token is (its sign was found before it), or None."""
    if len(token) > _MAX_TOKEN_CHARS or not any("0" <= char <= "9" for char in token):
        return None
    match = _NUMBER.fullmatch(token)
    if match is None or max(len(part) for part in re.findall("[0-9]+", token)) > MAX_DIGITS:
        return None
    if match["under"] is not None:
        try:
            value = _EXACT.divide(Decimal(match["over"]), Decimal(match["under"]))
            if match["whole"] is not None:
                if value >= 1:  # "2 5/3" is no mixed number
                    return None
                value = _EXACT.add(Decimal(match["whole"]), value)
        except DecimalException:  # no finite decimal, or a division by zero
            return None
    else:
        digits = re.sub(f"[{_GROUP} ]", "", match["digits"])
        exponent = int(match["exponent"] or 0)
        if abs(exponent) > MAX_EXPONENT or len(digits.replace(".", "")) > MAX_DIGITS:
            return None
        value = Decimal(f"{digits}e{exponent}")  # exact, as the constructor always is
    return value.copy_negate() if negative else value  # unary minus would round
