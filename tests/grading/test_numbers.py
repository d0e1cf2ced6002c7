"""Numbers: which text is which number, which text is none, and comparisons are exact."""

from __future__ import annotations

import decimal
import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.grading import extract_prediction, is_correct, numbers_in, parse_gold, parse_number

NUMBERS = [
    ("5", "5"), ("0", "0"), ("-5", "-5"), ("+5", "5"), ("−5", "-5"), ("–5", "-5"), ("- 5", "-5"),
    (" 5\n", "5"),
    ("5.00", "5"), (".5", "0.5"), ("-.5", "-0.5"), ("007", "7"), ("5.", "5"), ("5,", "5"), ("5...", "5"),
    ("8,000.", "8000"),
    ("8,000", "8000"), ("1,000,000.50", "1000000.5"), ("-1,234", "-1234"), ("8\u00a0000", "8000"),
    ("8\u202f000", "8000"), ("8 000", "8000"), ("$1 250 000.50", "1250000.5"), ("-8 050 km", "-8050"),
    ("$5", "5"), ("5$", "5"), ("$ 5", "5"), ("$1,234.56", "1234.56"), ("-$5", "-5"), ("$-5", "-5"),
    ("$.50", "0.5"),
    ("€5", "5"), ("5 €", "5"), ("£5", "5"), ("¥5", "5"), ("US$5", "5"), ("USD 5", "5"), ("USD5", "5"),
    ("Rs.500", "500"),
    ("5 apples", "5"), ("5 km", "5"), ("12kg", "12"), ("5 km/h", "5"), ("5/hour", "5"), ("5-year-old", "5"),
    ("5m²", "5"),
    ("5 m^2", "5"), ("12th", "12"), ("10 pm", "10"), ("5e", "5"), ("5 em", "5"), ("5°C", "5"),
    ("50%", "50"), ("50 %", "50"), ("5k", "5"),
    ("3.5e2", "350"), ("3.5E+2", "350"), ("5e-2", "0.05"), ("1e30", "1e30"), ("5e3kg", "5000"),
    ("1/2", "0.5"), ("-1/2", "-0.5"), ("3 1/4", "3.25"), ("-3 1/4", "-3.25"), ("6/3", "2"),
    ("1/2 cup", "0.5"),
    ("**5**", "5"), ("_5_", "5"), ("`5`", "5"), ("(5)", "5"), ('"5"', "5"), ("= 5", "5"), ("[5]", "5"),
    ("\\$8{,}000", "8000"), ("8\\,000", "8000"), ("8,\\!000", "8000"), ("\\frac{1}{2}", "0.5"),
    ("1\\frac{1}{2}", "1.5"), ("\\dfrac{3}{4}", "0.75"), ("\\frac12", "0.5"), ("-\\frac{1}{2}", "-0.5"),
    ("$18$", "18"), ("\\(18\\)", "18"), ("$\\$18$", "18"), ("\\text{18 apples}", "18"), ("18^\\circ", "18"), ("18\\%", "18"),
    ("\\mathbf{18}", "18"), ("“18”", "18"), ("negative 5", "-5"), ("minus $5", "-5"), ("5 m²", "5"), ("5 µm", "5"),
    ("1" * 40, "1" * 40), ("-1." + "7" * 39, "-1." + "7" * 39),
]  # fmt: skip

NOT_NUMBERS = [
    "", " ", ",", ".", "-", "$", "/", "%", "e5", "none", "five",
    "NaN", "nan", "inf", "-Infinity", "1e31", "1e-31", "1e400", "1e999999999999", "1e+400",
    "1" * 41, "0." + "0" * 40,
    "10:30", "10:30:15", "10:30 am", "3:4", "1,2,3", "1,2", "12,34", "1,23,456", "0,500", "1,000.000.5",
    "1.000,5", "1234,567",
    "2**3", "10^{6}", "1.5 × 10^6", "1.5 \\times 10^{6}", "\\sqrt{5}", "2\\sqrt{3}", "2\\pi", "2 \\pi", "\\frac{20}{3}",
    "\\frac{a}{2}", "\\infty", "eighteen", "5 ½", "③",
    "1_000", "1.2.3", "192.168.0.1", "2024-01-05", "3/4/2024", "555-1234", "5-7", "5–7", "5—7", "$5-$7",
    "1'000", "5'11",
    "1/0", "0/0", "1/3", "2 5/3", "1/2/3", "2^3", "x^2", "0x10", "x2", "COVID-19", "v1.2", "3x4", "2π", "√5",
    "5²", "½", "3½",
    "about 5", "the answer is 5", "5 6", "5 apples and 6 pears", "100 200", "1 000 00", "2020 050", "5 + 5", "10 / 2",
    "--5", "-$-5",
    "<5", "# 5",
    "٣", "5٣", "٣5", "５", "5\ud8006", "#### 5",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_number(text: str, value: str) -> None:
    assert parse_number(text) == Decimal(value)
    # The same, as an answer: a worker's JSON string, and its last words.
    assert extract_prediction(json.dumps({"final_answer": text})) == Decimal(value)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_not_a_number(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("5 + 5 = <<5+5=10>>10\n#### 10", "10"),
        ("#### 1,234", "1234"),
        ("x\n####-5\n", "-5"),
        ("#### $0.50", "0.5"),
        ("#### 0", "0"),
        ("\ud800 #### 7", "7"),
    ],
)
def test_gold(answer: str, value: str) -> None:
    assert parse_gold(answer) == Decimal(value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("42", "no '####' marker"),
        ("", "no '####' marker"),
        ("### 42", "no '####' marker"),
        ("#### 4 #### 2", "2 '####' markers"),
        ("######## 42", "2 '####' markers"),
        ("##### 42", "no number"),
        ("42 ####", "no number"),
        ("#### ,", "no number"),
        ("#### unknown", "no number"),
        ("#### 10:30", "no number"),
        ("#### 4\n5", "no number"),
        ("#### 1/3", "no number"),
    ],
)
def test_gold_error_says_what_is_wrong_and_shows_it_on_one_line(answer: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        parse_gold("first line\n" * 50 + answer)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 250
    assert repr(answer)[1:-1] in message


def test_correct_is_exact() -> None:
    assert is_correct('{"final_answer": "5.00"}', Decimal(5))
    assert is_correct("It is 8,000.", Decimal(8000))
    assert is_correct('{"final_answer": 0}', Decimal(0))
    assert is_correct('{"final_answer": -0.0}', Decimal(0))
    assert not is_correct('{"final_answer": 0.30000000000000004}', Decimal("0.3"))
    assert not is_correct("5.0000001", Decimal(5))
    assert not is_correct("50%", Decimal("0.5"))
    # No answer is not the answer 0.
    assert not is_correct('{"final_answer": null}', Decimal(0))
    assert not is_correct("", Decimal(0))


@pytest.mark.parametrize("precision", [2, 28])
def test_no_rounding_whatever_the_callers_decimal_context(precision: int) -> None:
    long = "1234567890123456789012345678901234567.5"
    with decimal.localcontext(prec=precision):
        assert str(parse_number("-" + long)) == "-" + long
        assert parse_number("1/64") == Decimal("0.015625")
        assert parse_number("123 1/64") == Decimal("123.015625")
        assert not is_correct("-" + long, parse_gold("#### -" + long[:-1] + "4"))


def test_numbers_in_running_text() -> None:
    assert numbers_in("Of $1,200 he spends 1/4, so 12 + 6 = 18 at 10:30.") == {1200, Decimal("0.25"), 12, 6, 18}


# --- any text ------------------------------------------------------------------------------------------------

PIECES = ["1", "23", "000", ",", ".", "-", "−", "/", ":", " ", "$", "%", "e", "^", "_", "kg", "USD", "\\frac{1}{", "}",
          "\\", "\\times", "\\sqrt{", "**", "negative ", "=", "x", "+", '"', "\u00a0", "½", "٣", "(", "\n", "####"]  # fmt: skip


@settings(deadline=None)  # a slow machine must not fail the test
@given(st.one_of(st.text(st.characters(), max_size=200), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
def test_never_raises(text: str) -> None:
    for number in (parse_number(text), *numbers_in(text)):
        assert number is None or number.is_finite()
    try:
        assert parse_gold(text).is_finite()
    except ValueError as error:
        assert "\n" not in str(error)


@settings(deadline=None)  # a slow machine must not fail the test
@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**20), max_value=10**20),
    st.sampled_from(["{}", "{} apples", "{}kg", "{}%", "{} €", "**{}**", "{}.", " {},\n"]),
)
def test_formatted_number_reads_back(number: Decimal, form: str) -> None:
    text = form.format(f"{number:,.2f}")
    assert parse_number(text) == number
    assert is_correct(f"First 12, then 7; at last: {text}", number)
    assert is_correct(json.dumps({"note": "7", "final_answer": text, "steps": 9}), number)
    assert parse_gold(f"2 + 2 = 4\n#### {number:,f}".replace("-", "−")) == number


@settings(deadline=None)  # a slow machine must not fail the test
@given(st.integers(min_value=-(10**30), max_value=10**30))
def test_integer_with_separators_reads_back_and_its_neighbours_differ(number: int) -> None:
    text = f"{number:,}"
    assert parse_number(text) == number
    assert not is_correct(text, Decimal(number + 1))
