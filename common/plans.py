"""Plans: what the planner writes, and the parser that turns its text into a validated `Plan`.

A planner completion is arbitrary text from a model in training. So the parser never raises, for any string, and takes
time linear in the length: a megabyte of `{` takes about a second. There is no limit to nesting. The module imports
only the standard library.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_SUBPROBLEMS = 8
MAX_SUBPROBLEM_CHARS = 500


def letters_of(text: str) -> str:
    """The letters and digits of a text in lower case, to compare texts without spaces and punctuation."""
    return "".join(char for char in text.casefold() if char.isalnum())


@dataclass(frozen=True, slots=True)
class Plan:
    """The planner's decision: solve the question directly, or split it into subproblems and combine their solutions.

    The class checks nothing; plans from `parse_planner_output` are validated.

    Attributes:
        should_decompose: whether to split.
        subproblems: what the worker solves one by one; empty for a direct plan.
        plan: how the solutions combine into the answer, as text.
    """

    should_decompose: bool
    subproblems: tuple[str, ...]
    plan: str = ""

    def to_json(self) -> str:
        """The compact JSON that a planner should write for this plan, with keys in the documented order."""
        fields = {
            "should_decompose": self.should_decompose,
            "subproblems": list(self.subproblems),
            "plan": self.plan,
        }
        # Not ASCII-escaped, because the planner learns to write this text, and "\u20ac" takes more tokens than "€".
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def parse_planner_output(
    text: str,
    *,
    max_subproblems: int = MAX_SUBPROBLEMS,
    max_subproblem_chars: int = MAX_SUBPROBLEM_CHARS,
    finished: bool = True,
) -> Plan | None:
    """Return the first valid plan in a planner completion, or None. Never raises; takes linear time.

    The first plan is the one whose opening brace comes first, so an outer object comes before those inside it. Around
    the plan these are allowed: prose, code fences, stray braces and quotes, and other objects. Inside it these are
    allowed: unknown keys, raw newlines in strings, and repeated keys (the last counts). Otherwise it must be JSON. A
    draft inside the reasoning of a reasoning model does not count (see `after_reasoning`).

    An object is a plan if
      - `should_decompose` is true or false (not 1, "true" or null);
      - `subproblems` is a list of at most `max_subproblems` strings, each with 1 to `max_subproblem_chars`
        characters after stripping. If `should_decompose` is true, it holds at least one. If it is false, the list may
        be missing; a list that is there is checked too, and then dropped;
      - `plan` is a string, null or missing (the last two become "");
      - none of these strings contains half of a surrogate pair, which no tokenizer accepts.

    Args:
        text: the completion.
        max_subproblems: most subproblems of a plan.
        max_subproblem_chars: longest subproblem, in characters.
        finished: False if the completion was cut off by its token limit; then there is no valid plan.
    """
    if not finished:
        return None
    for found in json_objects(after_reasoning(text)):
        plan = _validate(found, max_subproblems, max_subproblem_chars)
        if plan is not None:
            return plan
    return None


# A beginning that never ends is reasoning too, but "<reasoning>" may also stand before a plain answer.
_REASONING_TAG = re.compile(
    r"(?P<end></(?i:think(?:ing)?|thoughts?|reasoning)>|\[/THINK\]|◁/think▷)|<(?i:think(?:ing)?)>|\[THINK\]|◁think▷"
)


def after_reasoning(text: str) -> str:
    """Return the part of a reasoning model's text that comes after its reasoning.

    It begins after the last `</think>` or another tag that models use for it (`</thinking>`, `</reasoning>`,
    `[/THINK]`, …). The matching `<think>` may be missing, because some chat templates put it into the prompt.
    Reasoning without an end reaches to the end of the text, so `<think>…` alone gives "".
    """
    begin, end = 0, len(text)
    for tag in _REASONING_TAG.finditer(text):
        if tag["end"]:
            begin, end = tag.end(), len(text)
        else:
            end = min(end, tag.start())
    return text[begin:end]


def near_plan_credit(
    text: str,
    *,
    max_subproblems: int = MAX_SUBPROBLEMS,
    max_subproblem_chars: int = MAX_SUBPROBLEM_CHARS,
    finished: bool = True,
) -> float:
    """Return how close `text` comes to a plan, in [0, 1]: 1.0 for a valid plan, less otherwise.

    An invalid text earns 1/7 for each of these six: an opening brace; after that brace, each of the three keys in
    double quotes, and a closing brace; and a complete JSON object with the key `should_decompose`. So "" earns 0,
    "{}" 2/7, and a plan with one bad value 6/7. Text inside the reasoning earns nothing.

    This is the optional format credit. It guides a planner that writes almost no valid JSON, but it also rewards
    texts that only look like a plan; so it is off by default. Never raises; takes linear time.

    Args:
        text: the completion.
        max_subproblems: as for `parse_planner_output`.
        max_subproblem_chars: as for `parse_planner_output`.
        finished: as for `parse_planner_output`.
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
    """Return the plan that a JSON object describes, or None. Only its three keys are read."""
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
    """Return whether `text` can be encoded; tokenizers and files raise on half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# --- finding JSON objects anywhere in a text -----------------------------------------------------------------


class JsonNumber(NamedTuple):
    """A JSON number as it was written. It is not converted here, because 10**5000 would have 5001 digits."""

    text: str


# "v": numbers and literals (with NaN and Infinity, like json.loads); "x": anything that JSON has only inside strings.
# An escaped quote in prose opens no string. Possessive quantifiers: a string without an end fails without backtracking.
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

# What may come next, as a set of token kinds: s a string, v another scalar, or the punctuation itself.
_FIRST_KEY, _KEY, _COLON, _VALUE, _FIRST_ITEM = "s}", "s", ":", "sv{[", "sv{[]"
_AFTER_VALUE = {True: ",}", False: ",]"}  # True: in an object; False: in a list


class Located(NamedTuple):
    """A JSON object in a text, and the index after its last character."""

    value: dict[str, object]
    end: int


class _Open:
    """An object or list whose closing bracket was not read yet."""

    __slots__ = ("container", "key", "start")

    def __init__(self, start: int, container: dict[str, object] | list[object]) -> None:
        self.start = start
        self.container = container
        self.key = ""  # key of the next value, if the container is an object

    def add(self, value: object) -> str:
        """Add a complete value; return the token kinds that may follow it."""
        if isinstance(self.container, dict):
            self.container[self.key] = value
            return _AFTER_VALUE[True]
        self.container.append(value)
        return _AFTER_VALUE[False]


def json_objects(text: str) -> list[dict[str, object]]:
    """Return the objects that `located_objects` finds, without their positions."""
    return [found.value for found in located_objects(text)]


def located_objects(text: str) -> list[Located]:
    """Return every JSON object in `text`, also nested ones, in the order of their opening braces.

    Values are as from json.loads, except that numbers are JsonNumber. Raw control characters in strings are allowed.
    Never raises; takes linear time.

    Calling `json.loads` at every brace would take quadratic time and recurse. Two facts avoid that:

    1. A quote is escaped or not, wherever reading starts, and a JSON string begins with an unescaped quote. So the
       strings lie between the 1st and 2nd such quote, the 3rd and 4th, and so on. If a stray quote in the prose shifts
       them, they lie between the 2nd and 3rd, the 4th and 5th, and so on. Two readings cover both cases.
    2. Within one reading, a token that may not follow ends every open object: reading from any of their braces would
       meet the same token. So a reading never goes back.
    """
    found: dict[int, Located] = {}
    first_string = _read_objects(text, 0, found)
    if first_string is not None:
        _read_objects(text, first_string + 1, found)
    return [value for _, value in sorted(found.items(), key=lambda item: item[0])]  # outer objects were found last


def _read_objects(text: str, begin: int, found: dict[int, Located]) -> int | None:
    """Read once from `begin`, add each object to `found` by its start, and return where the first string begins.

    If a quote is never closed, both readings continue outside strings and find the same objects.
    """
    first_string: int | None = None
    stack: list[_Open] = []  # open containers; the lowest is always an object
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
    """Return the string that a quoted JSON token stands for, or None if it has an invalid escape."""
    if "\\" not in token:
        return token[1:-1]
    try:
        value = json.loads(token, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def plan_schema(max_subproblems: int, max_subproblem_chars: int) -> dict[str, Any]:
    """JSON schema of a plan, for constrained decoding. It limits the list, which a small model may otherwise never end.

    Args:
        max_subproblems: as for `parse_planner_output`.
        max_subproblem_chars: as for `parse_planner_output`.
    """
    part = {"type": "string", "minLength": 1, "maxLength": max_subproblem_chars}
    properties = {
        "should_decompose": {"type": "boolean"},
        "subproblems": {"type": "array", "items": part, "maxItems": max_subproblems},
        "plan": {"type": "string"},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
