"""Plans to imitate, for the supervised warm start of the planner.

There are two sources: GSM8K's socratic variant, whose solution lines are `sub-question ** step`, and the generated
problems. Both teach the format of a plan. Neither shows which kind of plan earns more.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

from common.plans import Plan
from common.problems import generated
from common.problems.questions import Question

# Many sub-questions of GSM8K need the answer of another one. They stay, because the worker also sees the whole
# question. Only lines that are not questions are dropped.
_MARKER = " ** "


def socratic_plan(item: Question, draw: random.Random) -> Plan | None:
    """The plan in a socratic solution; None if nothing usable is left of it.

    A line without the marker is a step, not a sub-question. Items that are not questions (894 in the training set) and
    repeated sub-questions (in 1258 problems) are dropped. One plan in four is direct: every socratic problem is split,
    and a planner that never saw a direct plan could not choose one.

    Args:
        item: question with its socratic solution.
        draw: random generator that decides which plans are direct.
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
    """Yield (question, plan) for every question that gives a plan. The same seed gives the same plans."""
    draw = random.Random(seed)
    for item in items:
        plan = socratic_plan(item, draw) if _MARKER in item.answer else generated.demonstrate(item.question, draw)
        if plan is not None:
            yield item, plan


def _letters(text: str) -> str:
    return "".join(char for char in text.casefold() if char.isalnum())
