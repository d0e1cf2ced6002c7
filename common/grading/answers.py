"""Find the place in a worker's text that holds its answer. The docstring of `common.grading` states the rules."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice

from common.grading.numbers import last_number, starts_with_number, stated_number, without_remarks
from common.plans import JsonNumber, after_reasoning, located_objects

GRADER_VERSION = 3  # raise it when any grading rule changes: results of two versions cannot be compared


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

# At most so many markers and statements are looked at, so that any text takes linear time.
_MOST_PLACES = 20
# The `<number>` placeholder of our own instructions, which a model may repeat, is no answer.
_PLACEHOLDER = re.compile(r"\s*(?:<[a-z ]+>|\.\.\.)\s*", re.IGNORECASE)
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
_MARKER = re.compile(r"####+(?![\s#*_]*+(?:step|part)s?\b)", re.IGNORECASE)
_LABEL = re.compile(
    r"\s{0,9}[^0-9:=\n]{0,40}?(?:\banswer(?:\s+is)?\b(?:[\sa-z]{0,5}\([^()\n]{0,30}\))?[*_]{0,3}:?|[:=])", re.IGNORECASE
)
_ANSWER_HEADING = re.compile(r"\W*(?:(?:the|final|correct|total)\s)*(?:answer|result|total|sum)\W*", re.IGNORECASE)
# What a model writes after the marker if it has no answer. Other words there are a heading.
_REFUSAL = re.compile(
    r"\W*(?:unknown|none|null|nil|nan|n/a|no\b|not\b|cannot|can['’]t|undefined|undetermined|impossible|unclear|\?)",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"[0-9]")
_LIST_NUMBER = re.compile(r"[\s*_]*([0-9]{1,2})[.)]\s")
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?:\{|(?=[-−$\\]{0,3}(?:[0-9]|\.[0-9])))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WORKING = r"(?!\W*+(?:(?:let|let['’]?s|first|to|not|we (?:need|can|know|have to|must|start)|step)\b|number>))"
# "The answer is correct" says nothing about the number.
_REMARK = (
    r"\W{0,4}(?:(?:also|indeed|thus|therefore)\s)?(?:correct|right|wrong|incorrect|reasonable|plausible|valid|verified|"
    r"confirmed|consistent|simple|clear|obvious|straightforward|easy|exact|complete)\b(?!\s*:?\s*[*_$]{0,3}[0-9])"
)
_DENIED = r"\W*+(?:therefore\s)?(?:not|no\s+longer)\b"
_ASIDE = r"(?:\s{0,9}\([^()\n]{0,40}\)|,?\s{1,3}in\s[^.,:;!?\n]{1,20},?)?"  # "the answer (in dollars) is"
_STATED = re.compile(
    rf"""
    (?: (?:^|\b(?:the|our|my|final|correct)[\s_]{{1,3}})(?:(?:final|correct|total)[\s_]{{1,3}})?answer
        (?:\s{{1,9}}(?:to|for)\b[^.,:;!?\n]{{1,80}}?)?{_ASIDE}
        \s{{1,9}}(?:is|(?:would|should|will|must)\s+be)\b(?!{_DENIED})(?!{_REMARK})\.?
      | \banswer{_ASIDE}[*_`"'”’]{{0,4}}\s{{0,3}}:{_WORKING}
      | ^[^\w\n]{{0,6}}(?:ans\.?\s{{0,3}}[:=]|answer\s{{0,3}}=){_WORKING}
      | ^[#*_ \t]{{1,9}}answer[*_ \t]{{0,4}}\n(?=[\s*_$\-–−•]{{0,6}}[0-9])
      | \bfinal[\s_]answer[*_`"'”’]{{0,4}}
        (?:\s{{0,3}}[:=]{_WORKING} | [^\S\n]{{0,9}}\n | [^\S\n]{{1,9}}(?=[*_$\-−]{{0,3}}[0-9])) )
    (?: [^\w\n]{{0,4}}(?:yes|no)[.,!][^\S\n]{{1,3}} )?
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# Matches "… the final answer comes to 18" and "final answer unknown", but not "so 18 is the final answer".
_MENTIONED = re.compile(
    r"(?<!is the )(?<!is my )(?<!is our )(?<!as the )\bfinal[ _]answer(?=[^\S\n]{1,9}[^\W_])"
    rf"(?!\s{{1,9}}(?:(?:by|we|you|i|from|using|with|in)\b|(?:is|was)(?:{_DENIED}|{_REMARK})|(?:is|was|does|do)n['’]?t\b"
    r"|can(?:not|['’]t)\b|(?:may|might|can|could|will)\s{1,9}(?:vary|differ|depend|change)\b))",
    re.IGNORECASE,
)
# In "the final answer for 3 people is 18", the number stands after the verb.
_VERB = re.compile(r"(?:\bis\b|:)(?=[^0-9]{0,30}[0-9])", re.IGNORECASE)
# A statement about one part of a problem: "the answer to (A) is", "Part 2 answer:", "(B) … The answer is".
_TO_PART = re.compile(
    r"\b(?:(?:to|for)\s{1,3}(?:the\s{1,3})?(?:[A-H]\b|(?:part|problem|question|step|first|second|third|fourth)\b)"
    r"|(?:to|for|answer)\s{0,3}\([A-H0-9]\))",
    re.IGNORECASE,
)
_PART_LINE = re.compile(
    r"[^\w\n(]{0,6}(?:\(?[A-H]\)|(?:part|problem|question|step|q)[ ]{0,2}[#(]?[A-H0-9]{1,2}\b)", re.I
)
_NEXT_PART = re.compile(r"^[^\w\n(]{0,6}\([B-H]\)", re.MULTILINE)
_ON_THE_WAY = re.compile(r"\b(?:intermediate|partial|sub|using the|with the)\W{0,2}\Z", re.IGNORECASE)
_COMPUTES = re.compile(r"[0-9)%][^=\n]{0,60}?(?:[+*/×÷−-]|\bx\b|\\times)[^=\n]{0,60}=")
_OPERATES = re.compile(r"[0-9)%] ?(?:[+*/×÷=−-]|\\times|x )")
_CONCLUDES = re.compile(
    r"(?:[.!?;]\s|\n)\W{0,4}(?:so|thus|hence|therefore|in total|in all|altogether|the total)\b", re.I
)
_CHECKS = re.compile(r"\W*(?:check|verif|proof|note\b)", re.IGNORECASE)
_SAYS_SOMETHING = re.compile(r"[^\s*_#>`\"'$\\\[\](){}=:.-]")
_ANNOUNCES = re.compile(r"[^0-9]*:[\s*_]*")
# A list item below "Answer:", or a dash between words. Neither is a number or its sign.
_BULLET = re.compile(r"[^\S\n]{0,9}(?:[-–—•*+]|1[.)](?=[^\S\n]{1,9}\$?[0-9]))[^\S\n]{1,9}")
_DASH = re.compile(r"[^\S\n]{0,3}[–—][^\S\n]{1,3}")
_SENTENCE_END = re.compile(
    r"(?<!Mr)(?<!Mrs)(?<!Ms)(?<!Dr)(?<!St)[.!?;](?=\s*\Z|\s+[^\s0-9$€£¥\\*])"  # not in "approx. 5"
    r"|(?<=[0-9])[.!?;](?=\s)"
)
_NEXT_PROBLEM = re.compile(
    r"^[ \t#>*_\[(-]{0,9}(?:(?:(?:next|new|another|follow-?up)[ ])?(?:question|problem)|q|user|human|instruction"
    r"|example|exercise|task|input|the whole problem, for context only)(?P<number>[ \t]{0,3}#?[0-9]{1,3})?"
    r"[*_\])]{0,3}[ \t]{0,3}(?::|$)",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWERED = re.compile(r"^[^\w\n]{0,6}(?:a|answer|solution|assistant)[ *_]{0,3}:", re.IGNORECASE | re.MULTILINE)


def _without_next_problem(text: str) -> str:
    """Return `text` up to the heading of a next problem that the model invented.

    A heading before any answer belongs to the given problem, which the model repeats; then all of `text` is returned.
    """
    heading = _NEXT_PROBLEM.search(text)
    if heading is None:
        return text
    before = text[: heading.start()]
    explicit = _explicit_place(before) is not None
    # The prompts ask for a field. If the first one comes after the heading, the heading belongs to the working, unless
    # an answer was given before it and it begins a problem without a number.
    own_heading = heading["number"] is not None or not explicit
    if own_heading and _field(before) is None and _field(text[heading.end() :]) is not None:
        return text
    # "Question 2:" before an explicit answer may be a question that the model asks itself while it works. Numbers
    # before "Question:" may be those of the given problem. So it has to follow a result or an empty line.
    asks = before.endswith("\n\n") or ("=" in before and _ANSWERED.search(text, heading.end()))
    solved = heading["number"] is None and asks
    return before if explicit or (solved and last_number(before) is not None) else text


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
    objects = [
        found
        for found in located_objects(text)
        if "final_answer" in found.value and not _is_placeholder(found.value["final_answer"])
    ]
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


def _is_placeholder(value: object) -> bool:
    return isinstance(value, str) and _PLACEHOLDER.fullmatch(value) is not None


def _marked(text: str) -> str | None:
    """Return the number after the first `####` that is not the heading of a section."""
    digits_until = _after_last_digit(text)
    item = 0  # number of the last heading in a numbered list
    for marker in islice(_MARKER.finditer(text), _MOST_PLACES):
        line_end = text.find("\n", marker.end())
        line = text[marker.end() : line_end if line_end >= 0 else len(text)]
        if _REFUSAL.match(line):
            return ""
        numbered = _LIST_NUMBER.match(text, marker.end())
        following = item > 0 and numbered is not None and int(numbered[1]) == item + 1
        if following or _heads_a_list(text, marker.end(), r"\n[ \t]*####+[\s*_]*"):
            assert numbered is not None
            item = int(numbered[1])
            continue
        in_words = _SAYS_SOMETHING.search(line) is not None and _DIGIT.search(line) is None
        if not in_words or _ANSWER_HEADING.fullmatch(line):
            label = None if in_words else _LABEL.match(text, marker.end())
            _, rest = _line(text, marker.end() + len(line) if in_words else (label or marker).end())
            place = _sentence(rest)
            if starts_with_number(place):
                return without_remarks(place)
        if digits_until <= marker.end() + len(line):  # nothing follows that this could be the heading of
            return ""
    return None


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
    return _line(text, begin)[1]  # the box has no end, or is written without braces


def _stated(text: str) -> str | None:
    """Return what the last statement of the answer says. Statements about a part, and working, are passed over."""
    digits_until = _after_last_digit(text)
    for found in reversed(deque(_STATED.finditer(text), maxlen=_MOST_PLACES)):
        begin, line = _line(text, found.end())
        sentence = _sentence(line)
        end = begin + len(sentence)
        more = digits_until > end or _NEXT_PART.search(text, end) is not None
        if (more and _is_of_part(text, found, end)) or _begins_working(text, begin, end, found[0]):
            continue
        return without_remarks(sentence)
    mention = _last(_MENTIONED, text)
    if mention is None or (_TO_PART.match(text, mention.end() + 1) and "\n" in text[mention.end() :]):
        return None
    sentence = _sentence(_line(text, mention.end())[1])
    verb = _VERB.search(sentence)
    return without_remarks(sentence if verb is None else sentence[verb.end() :])


def _is_of_part(text: str, found: re.Match[str], end: int) -> bool:
    """Return whether a statement, whose sentence ends at `end`, is about a part of the problem."""
    if _TO_PART.search(found[0]) or _NEXT_PART.search(text, end):
        return True
    line_start = text.rfind("\n", 0, found.start()) + 1
    if _PART_LINE.match(text, line_start):
        return True
    return _ON_THE_WAY.search(text, max(line_start, found.start() - 20), found.start()) is not None


def _begins_working(text: str, begin: int, end: int, phrase: str) -> bool:
    """Return whether "Answer:" is followed by several steps: a numbered list, or equations in running text."""
    if not phrase.rstrip().endswith(":"):
        return False
    if _heads_a_list(text, begin, r"\n[^\S\n]*"):
        return True
    sentence, rest = text[begin:end], text[end : end + 400]
    if _CHECKS.match(rest.lstrip(".!?; \n")):
        return False
    computes, goes_on = _COMPUTES.search(sentence), _COMPUTES.search(rest)
    if starts_with_number(sentence):
        return bool(computes and goes_on)
    return bool(goes_on or _CONCLUDES.search(rest) or (computes and _OPERATES.search(rest)))


def _heads_a_list(text: str, begin: int, before_next: str) -> bool:
    """Return whether a list item with a number begins at `begin`, and an item with the next number follows."""
    first = _LIST_NUMBER.match(text, begin)
    return first is not None and re.search(rf"{before_next}{int(first[1]) + 1}[.)]", text[begin:]) is not None


def _after_last_digit(text: str) -> int:
    """Return the index after the last digit of `text`; 0 if there is none."""
    return len(text) - next((place for place, char in enumerate(reversed(text)) if "0" <= char <= "9"), len(text))


def _last(pattern: re.Pattern[str], text: str, begin: int = 0) -> re.Match[str] | None:
    found = deque(pattern.finditer(text, begin), maxlen=1)
    return found[0] if found else None


def _line(text: str, begin: int) -> tuple[int, str]:
    """Return the rest of the line from `begin` on; if it says nothing ("", markup, "as follows:"), the next line.

    Also returns where it begins. A bullet or dash at its beginning is left out.
    """
    for _ in range(2):
        said = _SAYS_SOMETHING.search(text, begin)
        if said is None:
            return len(text), ""
        begin = text.rfind("\n", begin, said.start()) + 1 or begin
        mark = (_BULLET if text[begin - 1 : begin] == "\n" else _DASH).match(text, begin)
        begin = begin if mark is None else mark.end()
        end = text.find("\n", begin)
        line = text[begin:] if end < 0 else text[begin:end]
        if end < 0 or not _ANNOUNCES.fullmatch(line):
            return begin, line
        begin = end
    return begin, line


def _sentence(line: str) -> str:
    return _SENTENCE_END.split(line, maxsplit=1)[0]
