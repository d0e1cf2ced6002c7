"""Plans: what the planner writes, and the parser that turns its text into a validated `Plan`.

A planner completion is arbitrary text from a model under training, so the parser here never raises, on any
string, and takes time linear in its length: a completion made of a megabyte of `{` costs about a second, and
no nesting is too deep. Nothing heavier than the standard library is imported.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_SUBPROBLEMS = 8
MAX_SUBPROBLEM_CHARS = 500


@dataclass(frozen=True, slots=True)
class Plan:
    """The planner's decision: solve directly, or split into `subproblems` and combine.

    Building one checks nothing; a Plan that comes from `parse_planner_output` has been validated.
    """

    should_decompose: bool
    subproblems: tuple[str, ...]
    plan: str = ""

    def to_json(self) -> str:
        """Return the compact JSON a planner should write for this plan (keys in their documented order)."""
        fields = {
            "should_decompose": self.should_decompose,
            "subproblems": list(self.subproblems),
            "plan": self.plan,
        }
        # Not ASCII-escaped: the planner imitates this text, and "\u20ac" costs it more tokens than "€".
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def parse_planner_output(
    text: str,
    *,
    max_subproblems: int = MAX_SUBPROBLEMS,
    max_subproblem_chars: int = MAX_SUBPROBLEM_CHARS,
    finished: bool = True,
) -> Plan | None:
    """Return the first valid plan in a planner completion, or None. Never raises; linear time.

    "First" is by position of the opening brace, so an outer object goes before those inside it. Prose, code
    fences, stray braces and quotes, other objects around it or wrapped around it, unknown keys, and raw
    newlines inside strings do not matter; of a repeated key the last counts. Otherwise it must be JSON. A draft
    inside the reasoning of a reasoning model is not the plan (see `after_reasoning`).

    An object is a plan when
      - `should_decompose` is true or false (not 1, "true" or null);
      - `subproblems` is a list of at most `max_subproblems` strings, each 1 to `max_subproblem_chars`
        characters after stripping; with `should_decompose` true it holds at least one, with false it may be
        missing, and is checked all the same and then dropped;
      - `plan` is a string, or null or missing (both become "");
      - none of these strings holds half of a surrogate pair: no tokenizer accepts one.

    finished=False says that the completion was cut off by its token limit: such a plan is always invalid.
    """
    if not finished:
        return None
    for found in json_objects(after_reasoning(text)):
        plan = _validate(found, max_subproblems, max_subproblem_chars)
        if plan is not None:
            return plan
    return None


def after_reasoning(text: str) -> str:
    """Return what a reasoning model says after its reasoning.

    That is what stands behind the last `</think>`, which may lack its `<think>`: some chat templates put that into
    the prompt. Reasoning that never ends goes on to the end of the text, so of `<think>…` alone nothing is left.
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


def near_plan_credit(
    text: str,
    *,
    max_subproblems: int = MAX_SUBPROBLEMS,
    max_subproblem_chars: int = MAX_SUBPROBLEM_CHARS,
    finished: bool = True,
) -> float:
    """Return how close `text` comes to a plan, in [0, 1]: exactly 1.0 for a valid one, below 1 otherwise.

    An invalid text earns one seventh for each of these landmarks: an opening brace; after the first one, each
    of the three keys in double quotes, and a closing brace; and a complete JSON object that has the key
    `should_decompose`. So "" earns 0.0, "{}" 2/7 and a plan with only a bad value 6/7. This is the optional
    format credit: a slope towards valid JSON for a planner that writes almost none, easy to fill with empty
    gestures, and therefore off by default. What stands in the reasoning earns nothing. Never raises; linear time.
    Pass the same limits as to the parser.
    """
    text = after_reasoning(text)
    limits = (max_subproblems, max_subproblem_chars)
    objects = json_objects(text)
    if finished and any(_validate(found, *limits) is not None for found in objects):
        return 1.0
    opening = text.find("{")
    if opening < 0:
        return 0.0
    landmarks = ('"should_decompose"', '"subproblems"', '"plan"', "}")
    hits = 1 + sum(text.find(landmark, opening) >= 0 for landmark in landmarks)
    hits += any("should_decompose" in found for found in objects)
    return hits / 7


def _validate(found: dict[str, object], max_subproblems: int, max_chars: int) -> Plan | None:
    """Return the plan that a JSON object stands for, or None. Looks at its three keys only."""
    decompose = found.get("should_decompose")
    if not isinstance(decompose, bool):
        return None
    listed = found.get("subproblems", None if decompose else [])
    if not isinstance(listed, list) or len(listed) > max_subproblems or (decompose and not listed):
        return None
    subproblems = []
    for item in listed:
        if not isinstance(item, str) or not _encodable(item):
            return None
        item = item.strip()
        if not 1 <= len(item) <= max_chars:
            return None
        subproblems.append(item)
    plan = found.get("plan")
    if plan is None:
        plan = ""
    if not isinstance(plan, str) or not _encodable(plan):
        return None
    return Plan(decompose, tuple(subproblems) if decompose else (), plan)


def _encodable(text: str) -> bool:
    """Return whether `text` is proper Unicode: tokenizers and files raise on a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# --- finding JSON objects anywhere in a text -----------------------------------------------------------------


class JsonNumber(NamedTuple):
    """A JSON number as it was written: converting is the reader's business (10**5000 has 5001 digits)."""

    text: str


# "v": numbers and literals (NaN and Infinity as json.loads has them), "x": what no JSON holds outside strings.
# An escaped quote in prose opens no string. Possessive quantifiers: an unclosed string fails without backtracking.
_TOKEN = re.compile(
    r"""
      (?P<s>"(?:[^"\\]++|\\.)*+")
    | (?P<p>[{}\[\]:,])
    | (?P<v>-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|true|false|null|NaN|-?Infinity)
    | [ \t\n\r]++
    | (?P<x>\\["\\]|[^\s{}\[\]:,"\\]++|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_LITERALS = {"true": True, "false": False, "null": None}

# What may come next, as a set of token kinds: s string, v other scalar, or the punctuation itself.
_FIRST_KEY, _KEY, _COLON, _VALUE, _FIRST_ITEM = "s}", "s", ":", "sv{[", "sv{[]"
_AFTER_VALUE = {True: ",}", False: ",]"}  # by: is the container an object?


class Located(NamedTuple):
    """A JSON object in a text, and where in the text it ends."""

    value: dict[str, object]
    end: int


class _Open:
    """A container whose closing bracket has not come yet."""

    __slots__ = ("container", "key", "start")

    def __init__(self, start: int, container: dict[str, object] | list[object]) -> None:
        self.start = start
        self.container = container
        self.key = ""  # of the value to come, in an object

    def add(self, value: object) -> str:
        """Take in a complete value; return what may follow it."""
        if isinstance(self.container, dict):
            self.container[self.key] = value
            return _AFTER_VALUE[True]
        self.container.append(value)
        return _AFTER_VALUE[False]


def json_objects(text: str) -> list[dict[str, object]]:
    """Return the objects that `located_objects` finds, without their places."""
    return [found.value for found in located_objects(text)]


def located_objects(text: str) -> list[Located]:
    """Return every JSON object in `text`, nested ones too, ordered by opening brace. Never raises; linear time.

    Values are as from json.loads, but numbers are JsonNumber. Raw control characters in strings are allowed.

    `json.loads` from every brace would be quadratic and recursive. Two facts avoid that. (1) Which quotes are
    escaped does not depend on where one starts reading, and strings in JSON open with an unescaped quote; so
    strings are the text between the 1st and 2nd such quote, the 3rd and 4th, … or, if a stray quote in
    the prose has shifted them, between the 2nd and 3rd, the 4th and 5th, …: two readings cover all.
    (2) In one reading, a token that cannot follow ends every object still open, because reading from any of
    their braces would meet that same token; so a reading never goes back.
    """
    found: dict[int, Located] = {}
    first_string = _read_objects(text, 0, found)
    if first_string is not None:
        _read_objects(text, first_string + 1, found)
    return [value for _, value in sorted(found.items(), key=lambda item: item[0])]  # outer ones were found last


def _read_objects(text: str, begin: int, found: dict[int, Located]) -> int | None:
    """Add start: object for each object of one reading from `begin`; return where its first string opens.

    After a quote that nothing closes both readings are outside strings, and find the same objects.
    """
    first_string: int | None = None
    stack: list[_Open] = []  # open containers, the bottom one always an object
    allowed = ""
    for match in _TOKEN.finditer(text, begin):
        kind = match.lastgroup
        if kind is None:  # white space
            continue
        if kind == "p":
            kind = match[0]
        elif kind == "s" and first_string is None:
            first_string = match.start()

        if stack and kind in allowed:
            top = stack[-1]
            if kind == "s":
                string = _decode(match[0])
                if string is None:
                    stack.clear()
                elif allowed is _KEY or allowed is _FIRST_KEY:
                    top.key = string
                    allowed = _COLON
                else:
                    allowed = top.add(string)
            elif kind == "v":
                token = match[0]
                allowed = top.add(_LITERALS[token] if token in _LITERALS else JsonNumber(token))
            elif kind == ":":
                allowed = _VALUE
            elif kind == ",":
                allowed = _KEY if isinstance(top.container, dict) else _VALUE
            elif kind == "{":
                stack.append(_Open(match.start(), {}))
                allowed = _FIRST_KEY
            elif kind == "[":
                stack.append(_Open(match.start(), []))
                allowed = _FIRST_ITEM
            else:  # the bracket that closes the top container
                stack.pop()
                if isinstance(top.container, dict):
                    found[top.start] = Located(top.container, match.end())
                if stack:
                    allowed = stack[-1].add(top.container)
        else:
            stack.clear()
            if kind == "{":
                stack.append(_Open(match.start(), {}))
                allowed = _FIRST_KEY
    return first_string


def _decode(token: str) -> str | None:
    """Return the string a quoted JSON token stands for, or None if it has an invalid escape."""
    if "\\" not in token:
        return token[1:-1]
    try:
        value = json.loads(token, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def plan_schema(max_subproblems: int, max_subproblem_chars: int) -> dict[str, Any]:
    """JSON schema of a plan. The bounds are the parser's: without them a small untrained model lists without end."""
    part = {"type": "string", "minLength": 1, "maxLength": max_subproblem_chars}
    properties = {
        "should_decompose": {"type": "boolean"},
        "subproblems": {"type": "array", "items": part, "maxItems": max_subproblems},
        "plan": {"type": "string"},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
