"""Plans to imitate: what a supervised warm start of the planner learns from.

Two sources: GSM8K's socratic variant, whose solution lines are `sub-question ** step`, and the generated
problems. Both teach the format of a plan; neither marks a kind of plan as the one that pays.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

from common.plans import Plan
from common.problems import generated
from common.problems.questions import Question

# A sub-question that needs another's answer cannot be solved on its own, but GSM8K's often do; the worker sees
# the whole question, so they stay. What is dropped is what is no question at all.
_MARKER = " ** "


def socratic_plan(item: Question, draw: random.Random) -> Plan | None:
    """The plan that a socratic solution spells out; None where nothing usable is left of it.

    Cleaning: a line without the marker is a step, not a sub-question; items that are not questions (894 in
    the training set) and repeated sub-questions (in 1258 problems) are dropped. One plan in four is direct,
    because every socratic problem is split, and a planner that never saw a direct plan could not choose.
    """
    if draw.random() < 0.25:
        return Plan(False, ())
    lines = [line for line in item.answer.split("\n") if _MARKER in line]
    asked = (re.sub(r"\s+", " ", line.split(_MARKER, 1)[0]).strip() for line in lines)
    distinct = {_letters(text): text for text in asked if text.endswith("?")}
    parts = tuple(distinct.values())
    if len(parts) < 2:
        return None
    return Plan(True, parts, "Combine the answers.")


def demonstrations(items: Iterable[Question], seed: int) -> Iterator[tuple[Question, Plan]]:
    """(question, plan) for every question that gives one; the same seed gives the same plans."""
    draw = random.Random(seed)
    for item in items:
        plan = socratic_plan(item, draw) if _MARKER in item.answer else generated.demonstrate(item.question, draw)
        if plan is not None:
            yield item, plan


def _letters(text: str) -> str:
    return "".join(char for char in text.casefold() if char.isalnum())
