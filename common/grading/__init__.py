r"""Grading: the number in a gold answer, the number in a worker's text, and whether they are equal.

The gold answer is the number after the one `####`. What a worker answers is read at one place in its text, the
first of these that is there:

1. its `final_answer` field, the last one if there are several; in JSON, or in what is nearly JSON (single quotes, a
   trailing comma, no braces, a missing end);
2. the number right behind the first `####`. A model that runs on invents a next problem with a marker of its own.
   A heading (`#### Step 2`) is no marker, and a label (`#### Total: 18`) may stand before the number;
3. the last `\boxed{}` (or `\fbox{}`);
4. what follows the last "answer is" or "answer:", else the last "final answer" in other words, up to the end of its
   sentence. One that only announces working ("To get the final answer, we add 5 and 7", "Answer: Let's see") is none;
5. the last number in the text.

The first four are explicit. An answer that was cut off counts only if it is explicit: its last number is one from
the middle of the working.

The place that decides, decides alone. Where it holds no number ("unknown", null, 10:30, 1/3, an expression such as
12 + 6 or 1.5 × 10^6) there is no answer, and none is looked for elsewhere: that would pay for a number from the
working. Of several numbers at an explicit place the one behind the last "=" counts, else the first. What is said
about a number right behind a marker is not read: `#### 18 (3 + 4 = 7 in step 2)`, "the answer is 18, as 20 - 2 = 18".

Not read at all: reasoning (what stands before the last `</think>`, or behind a `<think>` that never ends, so an
answer that never leaves its reasoning is none), and a next problem that begins with a line such as "Question:",
"Q:", "Problem 2:" or "### User:" once there was an answer.

Numbers are compared exactly, as decimals; `common.grading.numbers` says what is read as one.
"""

from common.grading.answers import GRADER_VERSION, Prediction, extract_prediction, is_correct, predict
from common.grading.numbers import numbers_in, parse_gold, parse_number

__all__ = [
    "GRADER_VERSION",
    "Prediction",
    "extract_prediction",
    "is_correct",
    "numbers_in",
    "parse_gold",
    "parse_number",
    "predict",
]
