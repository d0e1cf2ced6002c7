"""Answers: which place in a worker's text decides, what is read there, and that no text makes it raise or slow."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.grading import extract_prediction, is_correct, predict

NEXT_PROBLEM = "Sam has 5 pears and buys 7 more. How many?"

# Cases of publicly reported faults of graders: text, gold, right, finished.
REPORTED = [
    ("2 + 40 = 42\n#### 42\n and the steps above, checked 3 times, confirm it.", "42", True, True),
    ("#### 18 (see step 2)", "18", True, True),
    (f"#### 18\n\nQuestion: {NEXT_PROBLEM}\nAnswer: 5 + 7 = 12\n#### 12", "18", True, True),
    (f"#### 18\n\nQuestion: {NEXT_PROBLEM}\nAnswer: 5 + 7 = 12\n#### 12", "12", False, True),
    ("The answer is \\boxed{18} (rounded to 3 figures).", "18", True, True),
    ("\\boxed{5}. That is wrong; the answer is \\boxed{7}.", "7", True, True),
    ("There are 9 pieces, so each gets 1/3.", "9", False, True),
    ("It is 1.5 × 10^6.", "1.5", False, True),
    ('{"final_answer": 12 + 6}', "6", False, True),
    ('{"final_answer": "12 + 6 = 18"}', "18", True, True),
    ("The total cost is $29.00.", "29", True, True),
    ("It fell to -3.", "3", False, True),
    ("So 18 of 20.", "20", True, True),
    ("So 12 * 5 = 60 for the chairs. Then for the tables we have 60", "60", False, False),
    ("#### 60\n\nQuestion: next one. There are", "60", True, False),
]


@pytest.mark.parametrize(("text", "gold", "right", "finished"), REPORTED)
def test_reported_faults(text: str, gold: str, right: bool, finished: bool) -> None:
    assert is_correct(text, Decimal(gold), finished=finished) == right


# By the place that decides: the number read there, or None for no answer. Most texts contain another number too.
FIELD = [
    ('{"final_answer": 42}', "42"), ('{"final_answer": "42"}', "42"), ('{"final_answer": 42.0, "steps": 7}', "42"),
    ('{"final_answer": "$8,000.00"}', "8000"), ('{"final_answer": "The answer is 42 apples."}', "42"),
    ('{"final_answer": "10 - 3 = 7"}', "7"), ('{"final_answer": 0, "work": "5 - 5"}', "0"),
    ('{"final_answer": -0.5}', "-0.5"), ('{"final_answer": 4.2e1}', "42"), ('{"final_answer": 0.1}', "0.1"),
    ('{"work": "line\nline 7", "final_answer": 42}', "42"),
    ('```json\n{"final_answer": 42}\n```\nI used 3 steps.', "42"),
    ('{"final_answer": 1} no, wait: {"final_answer": 2} in 9 steps', "2"),
    ('{"final_answer": 2} {"note": 3}', "2"), ('{"result": {"final_answer": 42}, "n": 3}', "42"),
    ('{"final_answer": {"final_answer": 42}}', "42"), ('{ stray " {"final_answer": 42} 7', "42"),
    ('{"final_answer": 42, "note": "the \\"final_answer\\": 7"}', "42"),
    # Several numbers: the one after the last "=", or else the first.
    ('{"final_answer": "about 5 (of 20)"}', "5"), ('{"final_answer": "6 * 3 = 18, 18 + 2 = 20"}', "20"),
    ('{"final_answer": "5 bags with 4 each, so 5 * 4 = 20"}', "20"), ('{"final_answer": "18 = 12 + 6"}', "18"),
    ('{"final_answer": "18.33 to 2 decimals"}', "18.33"), ('{"final_answer": "20 / 3 ≈ 6.67"}', "6.67"),
    # Nearly JSON.
    ("{'final_answer': 42} 7", "42"), ("{'final_answer': '18', 'steps': 3}", "18"), ("{'final_answer': 'it's 18'} 3", "18"),
    ('{"final_answer": 18,} 7', "18"), ('{"final_answer": 42', "42"), ('{"final_answer": "18} 3', "18"),
    ('"final_answer": 18\nin 3 steps', "18"), ("final_answer: 18 in 3 steps", "18"), ("“final_answer”: “18” 3", "18"),
    ('{"final_answer": $42} 3', "42"), ('{"final_answer": 1,234} 3', "1234"), ('{"final_answer": 18 apples} 3', "18"),
    ('{\\"final_answer\\": \\"18\\"} 3', "18"), ('{"final_answer": \\boxed{18}} 3', "18"),
    ('{"final_answer": "\\$18"} 3', "18"), ('{"final_answer": "\\frac{1}{2}"} 3', "0.5"),
    ('{"final_answer": 1} {"final_answer": 2,}', "2"), ("{'final_answer': 1} {\"final_answer\": 2}", "2"),
    # A repetition of our own instructions is no answer.
    ('End with JSON: {"final_answer": <number>}. 12 + 6 = 18', "18"),
    ('End with JSON: {"final_answer": <number>}.\n{"final_answer": 18} 3', "18"),
    ('The total is 18.\n{"final_answer": "<number>"}', "18"),
    # The field exists but holds no number: no other number counts.
    ('{"final_answer": null} 42', None), ('{"final_answer": true, "n": 1}', None), ('{"final_answer": [42]}', None),
    ('{"final_answer": {"value": 42}}', None), ('{"final_answer": "unknown", "work": "6 * 7 = 42"}', None),
    ('{"final_answer": ""} 42', None), ('{"final_answer": NaN} 42', None), ('{"final_answer": Infinity} 42', None),
    ('{"final_answer": 1e400} 42', None), ('{"final_answer": "10:30"} 42', None), ('{"final_answer": ","} 42', None),
    ('{"final_answer": 1} {"final_answer": null}', None), ('{"final_answer": 12 + 6}', None),
    ('{"final_answer": "12 + 6"}', None), ('{"final_answer": "12 plus 6"}', None), ('{"final_answer": "x + 5"}', None),
    ('{"final_answer": "1.5 × 10^6"}', None), ('{"final_answer": "1.5 \\times 10^6"}', None),
    ('{"final_answer": "5-7"}', None), ('{"final_answer": "5 = 10:30"}', None), ('{"final_answer": "eighteen"} 18', None),
    ('{"final_answer": "１８"} 18', None), ("{'final_answer': None} 42", None), ("{'final_answer': [42],} 7", None),
    ("{'final_answer': {'value': 42},}", None),
]  # fmt: skip
MARKER = [
    ("#### 42", "42"), ("####42.", "42"), ("#### 1,234 dollars", "1234"), ("#### $18.00 per day", "18"),
    ("#### -3", "-3"), ("#### 0 of 5", "0"), ("#### 50%", "50"), ("#### **18** 3", "18"), ("#### 3 1/4", "3.25"),
    ("#### \\boxed{18} 3", "18"), ("##### 18", "18"), ("####\n18\n3", "18"), ("#### ~18", "18"), ("#### 1.5 million", "1.5"),
    ("#### 18.\n#### 12", "18"), ("#### 18\n\\boxed{12}\nThe answer is 7", "18"),
    ("#### 18 (3 + 4 = 7 in step 2)", "18"), ("#### 18. Check: 3 + 4 = 7", "18"), ("#### 12 + 6 = 18", "18"),
    ("#### Total: $18 in 3 days", "18"), ("#### The answer is 18", "18"), ("#### Final Answer\n18\n2", "18"),
    ("#### Step 1: add\n3 + 4 = 7\n#### Step 2\n7 + 2 = 9\n#### 9\n1", "9"), ("#### Solution\nSo 18.", "18"),
    ("#### Answer: 18 of 20", "18"), ("#### **Final Answer:** 18 of 20", "18"), ("#### The answer is: $18", "18"),
    ("#### Answer: \\boxed{18}\n3", "18"), ("#### Answer (in dollars): 18\n3", "18"), ("#### Answer\n- 18 pens\n3", "18"),
    # Headings of sections.
    ("#### 1. Pens\n3 * 4 = 12\n#### 2. In all\n12 + 6 = 18\n\nThe total is $18.", "18"),
    ("#### Cost of pens:\n3 * 4 = 12\n\n#### Total:\n12 + 6 = 18", "18"),
    ("#### Understanding the problem\n12 and 6\n\\boxed{18}", "18"), ("#### Conclusion\nShe has 18.", "18"),
    ("#### Problem (A)\n3 * 5 = 15\n#### Sum\n15 + 28 = 43", "43"), ("#### Final Answer\nShe has 18.", "18"),
    ("5 #### 1/3", None), ("5 #### 10:30", None), ("5\n#### unknown", None), ("5\n#### none of the 3", None), ("5 ####", None),
    ("5\n#### 12 + 6", None), ("#### 1.5 x 10^6", None), ("5\n#### unknown\n#### 7", None), ("#### about 18", None),
]  # fmt: skip
BOX = [
    ("\\boxed{18} of 20", "18"), ("\\fbox{18} of 20", "18"), ("\\boxed 5 of 20", "5"), ("\\boxed{18", "18"),
    ("\\boxed{1,234} 3", "1234"), ("\\boxed{1{,}042} 3", "1042"), ("\\boxed{\\text{18 apples}} 3", "18"),
    ("\\boxed{18 \\text{ apples in 3 bags}} 3", "18"), ("\\boxed{\\frac{1}{2}} 3", "0.5"), ("\\boxed{{18}} 3", "18"),
    ("\\boxed{\\boxed{18}} 3", "18"), ("\\boxed{\\{18\\}} 3", "18"), ("\\boxed{x = 18} 3", "18"), ("\\boxed{\\$18} 3", "18"),
    ("\\boxed{12 + 6 = 18} 3", "18"), ("\\boxed{18\\%} 3", "18"), ("\\boxed{5}. No, 3 \\fbox{7} 2", "7"),
    ("The answer is 5. \\boxed{18} is the answer: 6", "18"), ("Put it in \\boxed. So 18", "18"),
    ("\\boxed{3 \\frac{1}{4}} 5", "3.25"), ("\\boxed{3\\,\\frac{1}{4}} 5", "3.25"), ("\\boxed{\\color{red}{18}} 5", "18"),
    ("\\boxed{\\frac{-1}{2}} 5", "-0.5"), ("\\boxed{} 5", None), ("\\boxed{unknown} 5", None), ("\\boxed{\\frac{20}{3}} 5", None), ("\\boxed{10^{6}} 5", None),
    ("\\boxed{2\\sqrt{3}} 5", None), ("\\boxed{2\\pi} 5", None), ("\\boxed{12 + 6} 5", None), ("\\boxed{x + 5}", None),
    ("\\boxed{\\frac{a}{2}} 5", None), ("\\boxed{5} \\boxed{?}", None),
]  # fmt: skip
STATED = [
    ("**Answer:** 42 of 50", "42"), ("**Answer**: 42 of 50", "42"), ("ANSWER: 18 of 20", "18"), ("Answer:5 of 6", "5"),
    ("Answer: -5", "-5"), ("Answer:-$5", "-5"), ("Answer: - 5", "-5"), ("Answer: $18$ 3", "18"), ("Answer: \\$18 for 3", "18"),
    ("Answer: **18** 3", "18"), ("Answer: 12 + 6 = 18", "18"), ("Answer: 6 * 3 = 18, 18 + 2 = 20", "20"),
    ("Answer: 18 dollars for 3", "18"), ("Answer: USD 18 for 3", "18"), ("Answer: approx. 18 of 20", "18"),
    ("Answer: Mrs. Hilt has 18. She had 3.", "18"), ("Answer: 5 bags at $2 each = $10", "10"),
    ("Answer: 20% of 50 = 10 of 50", "10"), ("Answer:\n\n18 (of 20)\n3", "18"), ('{"answer": 18, "n": 3}', "18"),
    ("The answer is: \\(18\\), not 3", "18"), ("The answer is.5", "5"), ("The answer is .5", "0.5"),
    ("The answer is…5", "5"), ("the answer is—5", "5"), ("the answer is--5", "5"), ("The answer is $5 and $7.", "5"),
    ("The answer is 42. Check: 6*7=42, 40+2", "42"), ("The answer is 18, as 20 - 3 = 17", "18"),
    ("The answer is 18 and 3 + 4 = 7 was used.", "18"), ("The answer is 18 km/h in 3 h.", "18"),
    ("The answer is\n\n18\n\nin 3 steps", "18"), ("The answer is as follows:\n18\n3", "18"), ("The answer is $-18$ now 3", "-18"),
    ("The answer is negative 18, not 3", "-18"), ("The answer to part 2 is 18, not 3", "18"), ("The answer is 1. The answer is 2, not 3", "2"),
    ("Final Answer: The final answer is $18$. I hope this is correct, 3.", "18"), ("Final Answer\n\n**18** 3", "18"),
    ("The final answer (in dollars) is: 18 for 3", "18"), ("The final answer comes to 18 of 20", "18"),
    ("final answer is therefore 7 because 3 of 4 = 0.75 were", "7"), ("final answer 18 of 20", "18"),
    ("The answer is 18. I hope this final answer helps in 3 ways", "18"),
    ("Answer: Mr. and St. Louis has 18. 3", "18"), ("Answer: Yes. She has 18 dollars.", "18"),
    ("Answer:\n- 18 apples\n3", "18"), ("### Final Answer\n- 18 apples\n3", "18"), ("The answer is – 18 of 20", "18"),
    ("### Answer\n18 in 3", "18"), ("Ans: 18 of 20", "18"), ("The answer in dollars is 18 for 3.", "18"),
    ("The answer would be 18, not 20.", "18"), ("The answer is approx. **18** of 20.", "18"),
    ("The final answer rounded to 2 decimals is 18.33.", "18.33"), ("Final answer for 3 people: 18", "18"),
    # A remark that says no number, or denies one.
    ("The answer is 72. So the answer is correct. 3", "72"), ("12 + 6 = 18. The answer is correct.", "18"),
    ("Total 18. Please note that the final answer may vary.", "18"), ("The answer is simple. 12 + 6 = 18.", "18"),
    ("The final answer is not 12, it is 15.", "15"), ("The final answer isn't 12 but 15.", "15"), ("Answer: not 12, 15", "15"),
    # The steps of the working after "Answer:".
    ("Answer: Ann sold 48/2 = 24 pens in May. Ann sold 48 + 24 = 72 pens.", "72"),
    ("**Answer:**\nTom has 12 pens.\nHe buys 6 more.\n12 + 6 = 18", "18"),
    ("Answer: Tom has 12 pens. He buys 6 more. So he has 18 pens.", "18"),
    ("Answer:\n1. Tom has 3 * 4 = 12 pens.\n2. He buys 6 more: 12 + 6 = 18.", "18"),
    ("Answer: 12 + 6 = 18\n\nCheck: 18 - 6 = 12", "18"), ("Answer: She has 18 left. Check: 18 - 6 = 12", "18"),
    # The answers to parts of a problem.
    ("The answer to (A) is 15.\nThe answer to (B) is 28.\nThe sum is 15 + 28 = 43.", "43"),
    ("(A) Answer: 15\n(B) Answer: 28\nSum: 43", "43"), ("Part 1 answer: 12\nPart 2 answer: 6\nTotal: 12 + 6 = 18", "18"),
    ("(A) 3 * 5 = 15. The answer is 15.\n(B) 4 * 7 = 28. The answer is 28.\nSum: 43", "43"),
    ("The answer to (A) is 15.\n(B) 15 / 3 = 5 boxes, 5 * 4 = $20.", "20"), ("Partial answer: 12\nTotal: 18", "18"),
    ("The answer is 43. It is the sum of 15 and 28.", "43"), ("The answer to (B) is 28, not 3", "28"),
    ("5. The answer is 1/3.", None), ("5. The answer is 10:30.", None), ("5. Answer: unknown. She has 5.", None),
    ("5. The answer is 1.5 × 10^6.", None), ("5. The answer is 5-7.", None), ("3 + 4: the answer is eighteen.", None),
    ("5. Answer: ٣", None), ("5. Answer:", None), ("5. Final answer unknown.", None), ("5. The answer is 12 + 6.", None),
    # A phrase that only introduces the working, or refers back to the answer, does not count.
    ("To get the final answer, we add 5 and 7 to get 12.", "12"), ("Answer: Let's think. 12 + 6 = 18", "18"),
    ("Answer: First, 5 + 1 = 6. Then, 6 + 4 = 10.", "10"), ("So 18 is the final answer.", "18"),
    ("The third answer is 400 less, so 1800", "1800"), ("The answer is not 5 but 7", "7"),
]  # fmt: skip
LAST = [
    ('{"answers": 41} 42', "42"), ("So 3 + 4 = 7.", "7"), ("3+4=7", "7"), ("10-3=7", "7"), ("5*3=<<5*3=15>>15", "15"),
    ("3×4=12", "12"), ("3 \\times 4 = 12", "12"), ("The total is $1,234.56.", "1234.56"), ("x=42", "42"),
    ("it is $400 000 - $282 000 = $118 000.", "118000"), ("100 200 300", "300"), ("答案是42个", "42"),
    ("She has 0 left.", "0"), ("It is 50%", "50"), ("a change of +5", "5"), ("12 eggs - 18 in all", "18"),
    ("it is **18**", "18"), ("it is *18*", "18"), ("it is $-18$", "-18"),
    ("The area is $18\\text{ cm}^2$.", "18"), ("\\[ 3 \\times 6 = 18 \\text{ m}^2 \\]", "18"), ("It is 18 cm<sup>2</sup>", "18"),
    ("It takes 2 \\frac{1}{2} hours", "2.5"), ("It takes 2\u00a01/2 hours", "2.5"), ("5 - 8 = − 3", "-3"),
    ("She has 18 apples (12 + 6).", "18"), ("Tom pays $18 ($12 + $6).", "18"), ("It takes 18 days (3 of 4).", "4"),
    # A name or a unit is no number. Text that only looks like a number gives no answer.
    ("5 m^2", "5"), ("It takes 3 of GPT-4, x2 and H2O", "3"), ("She needs 12. Open 24/7.", None),
    ("She has 5 at 10:30", None), ("5, or 1e999", None), ("12 or ½", None), ("3 and 4 are ７", None), ("1.5*10**6", None),
    ("It has 3 and 4, so \\sqrt{5}", None), ("10 - 3", None), ("5*-3", None), ("So 12 + 6.", None), ("it is x + 5", None),
    ("v1.2.3", None), ("on 2024-01-05", None), ("1,2,3", None), ("between 5-7", None), ("no idea", None), ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [*FIELD, *MARKER, *BOX, *STATED, *LAST])
def test_answer(text: str, value: str | None) -> None:
    assert extract_prediction(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize("text", [text for text, _ in [*FIELD, *MARKER, *BOX, *STATED] if predict(text).explicit])
def test_explicit_answer_counts_though_it_was_cut_off(text: str) -> None:
    assert predict(text, finished=False) == predict(text)


@pytest.mark.parametrize(
    "text",
    [text for text, _ in LAST]
    + [
        "Answer: Ann sold 48/2 = 24 pens in May. Ann sold 48+",
        "The answer to (A) is 15.\n(B) In all",
        "Answer: Let's see, 3 + 4 = 7",
        "To find the final answer, we add 5",
        "So 18.\n\nQuestion: There are 5",
    ],
)
def test_last_number_of_a_cut_off_answer_is_none(text: str) -> None:
    assert predict(text, finished=False).number is None


def test_every_explicit_place_is_told_as_such() -> None:
    for text in ("{'final_answer': 18}", "#### 18", "\\boxed{18}", "The answer is 18.", "Answer: 18", "#### unknown"):
        assert predict(text).explicit
    assert not predict("So 18.").explicit


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # A next problem that the model invents after an answer.
        (f"The answer is 18.\n\nQuestion: {NEXT_PROBLEM}\nAnswer: 12", "18"),
        (f"5 + 13 = 18\n\nQ: {NEXT_PROBLEM}\nA: 12", "18"),
        (f"\\boxed{{18}}\n\n**Problem 2:** {NEXT_PROBLEM}\n\\boxed{{12}}", "18"),
        (f"The answer is 18.\n### User:\n{NEXT_PROBLEM}\n### Assistant:\nThe answer is 12.", "18"),
        (f'{{"final_answer": 18}}\n\nQuestion: {NEXT_PROBLEM}\n{{"final_answer": 12}}', "18"),
        (f"#### unknown\n\nQuestion: {NEXT_PROBLEM}\n#### 12", None),
        # Without such a line it could be a correction, so the last field counts, as documented.
        (f'{{"final_answer": 18}}\n\n{NEXT_PROBLEM}\n{{"final_answer": 12}}', "12"),
        (f'{{"final_answer": 18}}\n\nExample 2: {NEXT_PROBLEM}\n{{"final_answer": 12}}', "18"),
        (f'{{"final_answer": 18}}\n\nNext problem: {NEXT_PROBLEM}\n{{"final_answer": 12}}', "18"),
        (f'{{"final_answer": 18}}\n\n[Question]\n{NEXT_PROBLEM}\n{{"final_answer": 12}}', "18"),
        # The problem restated, and questions that the model asks itself.
        ('Step 1: Restate it.\nQuestion: How many?\nStep 2: 12 + 6 = 18\n{"final_answer": 18}', "18"),
        ('Given: 12 pens, 6 books.\nQuestion: total?\nSolution: 12 + 6 = 18\n{"final_answer": 18}', "18"),
        ('Problem 1: The answer is 15.\nProblem 2: 4 * 7 = 28\n{"final_answer": 43}', "43"),
        ("Question: Joe has 3 and 4. How many?\nAnswer: 7", "7"),
        ("Let's split it.\nQuestion 1: In the box? Answer: 5\nQuestion 2: In all? Answer: 18", "18"),
        # Reasoning is not read, whether or not it ends.
        ("<think>#### 5</think>The sum is 7", "7"),
        ("I try 5</think>\n7", "7"),
        ("<think>5</think>6<think>The answer is 8</think>", None),
        ("<think>3 + 4 = 7. #### 7", None),
        ("The answer is 7. <think>Or is the answer is 8", "7"),
        ("<thinking>#### 5</thinking>\nThe sum is 7.", "7"),
        ("[THINK]\\boxed{5}[/THINK]\n7", "7"),
        ("<reasoning>The answer is 5</reasoning>\n7", "7"),
        ("<reasoning> 3 + 4 = 7", "7"),
    ],
)
def test_what_is_not_part_of_the_answer(text: str, value: str | None) -> None:
    assert extract_prediction(text) == (None if value is None else Decimal(value))


# --- any text ------------------------------------------------------------------------------------------------

PIECES = [
    "1", "23", ",000", ".", "-", "−", "/", ":", " ", "\n", "$", "%", "=", "+", "×", "*", "**", "#", "^", "kg", "½", "٣",
    "####", "\\boxed{", "\\boxed ", "{", "}", "\\frac{1}{2}", "\\text{", '{"final_answer":', "{'final_answer': '",
    '"', "'", "“", "\\", "answer:", "Answer", "The answer is", "final answer", " to ", "because", "Let's", "not",
    "Question:", "\nQ:", "\n### User:\n", "<think>", "</think>", "null", "unknown", "\ud800", "\u00a0", "[",
]  # fmt: skip
SOUP = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@settings(deadline=None, max_examples=500)  # a slow machine must not fail the test
@given(st.one_of(st.text(st.characters(), max_size=200), SOUP))
def test_never_raises(text: str) -> None:
    whole, cut = predict(text), predict(text, finished=False)
    assert whole.number is None or whole.number.is_finite()
    assert whole.explicit == cut.explicit
    assert cut.number == (whole.number if whole.explicit else None)
    is_correct(text, Decimal(0))


@settings(deadline=None)
@given(SOUP, st.integers(-(10**12), 10**12), st.sampled_from(["#### {}", "\\boxed{{{}}}", "The answer is {}."]))
def test_no_text_after_a_finished_thought_changes_a_field(text: str, number: int, written: str) -> None:
    """The field comes before every other place, whatever text follows it."""
    after = text.replace("final_answer", "")
    assert is_correct(
        f'</think>{written.format(7)}\n{{"final_answer": {number}}}\n' + after.replace("think>", ""), Decimal(number)
    )


# --- very long texts -----------------------------------------------------------------------------------------

PATTERNS = [
    "{", '"', "'", "\\", "9", "-", "$", ".", ":", " ", "\n", "\ud800", "1 ", "1,", "1 1/", "1 000 ", "\\frac{1}{", "{,}",
    "1**", "^{1}", "√{", "1 + ", "12 eggs + ", "1 x ", "1=", "=", "*", "}{", "negative ", "1 because ", ". ", "1. ", ": ",
    '{"final_answer":', '{"final_answer":"', '{"final_answer":1}', "'final_answer': ' ", "{'final_answer':{", "' ,",
    "####", "#### ", "####\n", "#### 1", "#### step ", "\\boxed{", "\\boxed{1}", "\\boxed ", "answer:", "answer: let",
    "answer (", "answer", "the answer for ", "the answer is ", "final answer", "final answer ", "final answer\n",
    "#### a\n", "#### 1. a\n", "answer:\n1. ", "(A) answer: 1\n", "the answer is correct. ", "answer: 1 + 1 = 2\n",
    "\n(B) ", " (1 + ", "\nans: ", "# answer\n1\n", "[THINK]", "</reasoning>", "\\text{m", "\\color{a",
    "Question:\n", "\nQ: 1", "\n### User:\n1", "\n# ", "<think>", "</think>", "<think></think>",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_pattern_takes_more_than_linear_time(pattern: str) -> None:
    for prefix in ("", '{"final_answer": "', "{'final_answer': '", "#### ", "\\boxed{", "The answer is "):
        text = prefix + pattern * (50_000 // len(pattern))
        begin = time.process_time()
        predict(text)
        # About 0.15 s at worst; a quadratic regex or scan would take a quarter of a minute or more.
        assert time.process_time() - begin < 4


def test_megabyte_of_nested_json_is_no_answer() -> None:
    assert extract_prediction('{"final_answer":' * 70_000) is None
    assert extract_prediction("{" * 1_000_000 + '"final_answer": 5}') == 5


def test_huge_number_is_no_answer() -> None:
    digits = "9" * 1_000_000
    assert extract_prediction(digits) is None
    assert extract_prediction(f'{{"final_answer": {digits}}}') is None
    assert extract_prediction(f'{{"final_answer": "1e{digits}"}}') is None
    assert extract_prediction(f"#### {digits}") is None
