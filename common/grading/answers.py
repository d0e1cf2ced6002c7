"""Find the place in a worker's text that holds its answer. The docstring of `common.grading` states the rules."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from decimal import Decimal

from common.grading.numbers import last_number, starts_with_number, stated_number, without_remarks
from common.plans import JsonNumber, after_reasoning, located_objects

GRADER_VERSION = 2  # raise it when any grading rule changes: results of two versions cannot be compared


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer in a worker's text.

    Attributes:
        number: the answer, or None if there is none.
        explicit: whether it stands at one of the explicit places; see `common.grading`.
    """

    number: Decimal | None
    explicit: bool


def predict(text: str, *, finished: bool = True) -> Prediction:
    """Return the answer in a worker's text. Never raises; takes linear time.

    Args:
        text: the whole completion, reasoning included.
        finished: False for a completion that was cut off; it counts only if it is explicit.
    """
    text = _without_next_problem(after_reasoning(text))
    place = _explicit_place(text)
    if place is not None:
        return Prediction(stated_number(place), explicit=True)
    return Prediction(last_number(text) if finished else None, explicit=False)


def extract_prediction(text: str, *, finished: bool = True) -> Decimal | None:
    """Return the number that a worker's text gives as its answer, or None; see `predict`."""
    return predict(text, finished=finished).number


def is_correct(prediction_text: str, gold: Decimal, *, finished: bool = True) -> bool:
    """Return whether the answer in a worker's text is exactly equal to `gold`.

    Args:
        prediction_text: the whole completion; its answer is found as by `predict`.
        gold: the known answer.
        finished: False for a completion that was cut off; see `predict`.
    """
    prediction = extract_prediction(prediction_text, finished=finished)
    return prediction is not None and prediction == gold


# --- finding the place of the answer -------------------------------------------------------------------------

# Does not match the `<number>` placeholder of our own instructions, which a model may repeat.
_FIELD = re.compile(
    r"(?:\\?[\"'“”‘’`]|[{,]\s{0,20})final_answer\\?[\"'“”‘’`]?\s{0,20}:\s{0,20}+(?![\"']?(?:<[a-z]|\.\.\.))"
)
_FIELD_VALUE = re.compile(
    r"""
      \\?["“”](?P<double>(?:[^"“”\\\n]|\\.)*+)
    | \\?['‘’`](?P<single>(?:[^'‘’`\n]|['‘’`](?![^\S\n]{0,9}(?:[,}\]\n]|\Z)))*+)  # 'it's 18'
    | (?P<bare>(?:[^,}\n]|,(?=[0-9]{3}(?![0-9])))*+)                               # 18 apples, but also 1,234
    """,
    re.VERBOSE,
)
_MARKER = re.compile(
    r"####+(?![\s#*_]*+(?:step|part|solution|explanation|calculation|reasoning|working|given|approach|analysis)s?\b)",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\s{0,9}[^0-9:=\n]{0,40}?(?:[:=]|\banswer(?:\s+is)?\b)", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?:\{|(?=[-−$\\]{0,3}(?:[0-9]|\.[0-9])))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WORKING = r"(?!\W*+(?:(?:let['’]?s|let us|let me|first|to|we (?:need|can|know|have to|must|start)|step)\b|number>))"
_ASIDE = r"(?:\s{0,9}\([^()\n]{0,40}\))?"  # "the answer (in dollars) is"
_STATED = re.compile(
    rf"""
    (?: (?:^|\b(?:the|our|my|final|correct)[\s_]{{1,3}})(?:(?:final|correct|total)[\s_]{{1,3}})?answer
        (?:\s{{1,9}}(?:to|for)\b[^.,:;!?\n]{{1,80}}?)?{_ASIDE}\s{{1,9}}is\b(?!\s+not\b)\.?
      | \banswer{_ASIDE}[*_`"'”’]{{0,4}}\s{{0,3}}:{_WORKING}
      | \bfinal[\s_]answer[*_`"'”’]{{0,4}}
        (?:\s{{0,3}}[:=]{_WORKING} | [^\S\n]{{0,9}}\n | [^\S\n]{{1,9}}(?=[*_$\-−]{{0,3}}[0-9])) )
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# Matches "… the final answer comes to 18" and "final answer unknown", but not "so 18 is the final answer".
_MENTIONED = re.compile(
    r"(?<!is the )(?<!is my )(?<!is our )(?<!as the )\bfinal[ _]answer(?=[^\S\n]{1,9}[^\W_])"
    r"(?!\s{1,9}(?:by|we|you|i|from|using|with|in)\b)",
    re.IGNORECASE,
)
_SAYS_SOMETHING = re.compile(r"[^\s*_#>`\"'$\\\[\](){}=:.-]")
_ANNOUNCES = re.compile(r"[^0-9]*:[\s*_]*")
_SENTENCE_END = re.compile(
    r"(?<!Mr)(?<!Mrs)(?<!Ms)(?<!Dr)[.!?;](?=\s*\Z|\s+[^\s0-9$€£¥\\])|(?<=[0-9])[.!?;](?=\s)"  # not in "approx. 5"
)
_NEXT_PROBLEM = re.compile(
    r"^[ \t#>*_-]{0,9}(?:question|problem|q|user|human|instruction)(?P<number>[ \t]{0,3}#?[0-9]{1,3})?"
    r"[*_]{0,3}[ \t]{0,3}(?::|$)",
    re.IGNORECASE | re.MULTILINE,
)


def _without_next_problem(text: str) -> str:
    """Return `text` up to the heading of a next problem that the model invented.

    A heading before any answer belongs to the given problem, which the model repeats; then all of `text` is returned.
    """
    heading = _NEXT_PROBLEM.search(text)
    if heading is None:
        return text
    before = text[: heading.start()]
    # "Question 2:" before an explicit answer may be a question that the model asks itself while it works.
    answered = _explicit_place(before) is not None or (heading["number"] is None and last_number(before) is not None)
    return before if answered else text


def _explicit_place(text: str) -> str | None:
    """Return the text at the explicit place that decides ("" if it holds no number), or None if there is none."""
    for find in (_field, _marked, _boxed, _stated):
        place = find(text)
        if place is not None:
            return place
    return None


def _field(text: str) -> str | None:
    if "final_answer" not in text:
        return None
    objects = [found for found in located_objects(text) if "final_answer" in found.value]
    nearly = _last(_FIELD, text, objects[-1].end if objects else 0)
    if nearly is not None:
        value = _FIELD_VALUE.match(text, nearly.end())
        written = value[value.lastgroup] if value is not None and value.lastgroup is not None else ""
        return "" if written.startswith(("[", "{")) else written
    if not objects:
        return None
    answer = objects[-1].value["final_answer"]
    if isinstance(answer, JsonNumber):
        return answer.text
    return answer if isinstance(answer, str) else ""


def _marked(text: str) -> str | None:
    marker = _MARKER.search(text)
    if marker is None:
        return None
    label = _LABEL.match(text, marker.end())
    place = _sentence(_line(text, (label or marker).end()))
    return without_remarks(place) if starts_with_number(place) else ""


def _boxed(text: str) -> str | None:
    box = _last(_BOX, text)
    if box is None:
        return None
    begin = box.end()
    if box[0].endswith("{"):
        depth = 1
        for brace in _BRACE.finditer(text, begin):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[begin : brace.start()]
    return _line(text, begin)  # the box has no end, or is written without braces


def _stated(text: str) -> str | None:
    found = _last(_STATED, text) or _last(_MENTIONED, text)
    return None if found is None else without_remarks(_sentence(_line(text, found.end())))


def _last(pattern: re.Pattern[str], text: str, begin: int = 0) -> re.Match[str] | None:
    found = deque(pattern.finditer(text, begin), maxlen=1)
    return found[0] if found else None


def _line(text: str, begin: int) -> str:
    """Return the rest of the line from `begin` on; if it says nothing ("", markup, "as follows:"), the next line."""
    for _ in range(2):
        said = _SAYS_SOMETHING.search(text, begin)
        if said is None:
            return ""
        begin = text.rfind("\n", begin, said.start()) + 1 or begin
        end = text.find("\n", begin)
        line = text[begin:] if end < 0 else text[begin:end]
        if end < 0 or not _ANNOUNCES.fullmatch(line):
            return line
        begin = end
    return line


def _sentence(line: str) -> str:
    return _SENTENCE_END.split(line, maxsplit=1)[0]
