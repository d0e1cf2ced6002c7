r"""Grading: find the number in a gold answer and in a worker's text, and compare the two.

The gold answer is the number after the only `####` in its text. The worker's answer is read at the first of these
places that exists in the worker's text:

1. The `final_answer` field; the last one if there are several. The text may be JSON or nearly JSON (single quotes, a
   trailing comma, no braces, a missing end).
2. The number directly after the first `####`. Only the first, because a model that does not stop often invents a next
   problem with its own marker. A label may come before the number (`#### Total: 18`). A heading (`#### Step 2`, `####
   Conclusion`) is not a marker: other words than a refusal ("unknown"), before more text with numbers.
3. The last `\boxed{}` or `\fbox{}`.
4. The rest of the sentence after the last "answer is" or "answer:". If there is none: after the last "final answer" in
   another phrase ("the final answer comes to 18"). These phrases do not count: one that introduces the working ("To
   get the final answer, we add 5 and 7", "Answer:" before a list of steps or before several equations); one that says
   no number ("the answer is correct"); and one about a part of the problem, if more follows ("the answer to (A) is
   15").
5. The last number in the text. An expression in parentheses at the end is passed over: "18 apples (12 + 6)".

The first four places are explicit. An answer that was cut off counts only if it is explicit, because its last number
comes from the middle of the working.

The first place that exists decides. If it holds no number ("unknown", null, 10:30, 1/3, or an expression such as
12 + 6 or 1.5 × 10^6), there is no answer. No other place is tried, because that would reward a number from the
working. If an explicit place holds several numbers, the one after the last "=" counts, or else the first. Remarks
after the number are ignored: `#### 18 (3 + 4 = 7 in step 2)`, "the answer is 18, as 20 - 2 = 18".

Two parts of the text are never read. The first is reasoning: everything before the last `</think>` (or a tag like it),
or after a `<think>` that never ends. So a text that consists only of reasoning has no answer. The second is a next
problem after an answer: from a line such as "Question:", "Q:", "Problem 2:" or "### User:" on. But if the first
`final_answer` field comes after such a line, the line usually belongs to the working.

Numbers are compared exactly, as decimals. `common.grading.numbers` defines what is read as a number.
"""

from common.grading.answers import GRADER_VERSION, Prediction, extract_prediction, is_correct, predict
from common.grading.numbers import numbers_in, parse_gold, parse_number
from common.grading.written import numbers_in_words, values_in

__all__ = [
    "GRADER_VERSION",
    "Prediction",
    "extract_prediction",
    "is_correct",
    "numbers_in",
    "numbers_in_words",
    "parse_gold",
    "parse_number",
    "predict",
    "values_in",
]
