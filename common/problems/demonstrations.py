"""Plans to imitate, for the supervised warm start of the planner.

They are made from three sources: GSM8K's socratic variant, whose solution lines are `sub-question ** step`; generated
problems; and composed questions. All of them teach the format of a plan. None of them shows which kind of plan earns
more reward.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

from common.errors import UserError
from common.plans import MAX_SUBPROBLEM_CHARS, Plan, letters_of
from common.problems import composed, generated
from common.problems.questions import Question, is_generated, load_questions
from common.settings.sft import SupervisedArgs

Plans = list[tuple[Question, Plan]]  # questions, each with a plan to imitate

# Between sub-question and step in a line of a socratic solution. Many sub-questions need the answer of another one.
# They are kept, because the worker also sees the whole question.
_MARKER = " ** "

# Plans for composed questions. All kinds are equally frequent, and the parts are in random order.
DIRECT, BY_REFERENCE, PARTIAL, SELF_CONTAINED = "direct", "by reference", "partial", "self-contained"
COMPOSED_KINDS = (DIRECT, BY_REFERENCE, PARTIAL, SELF_CONTAINED)
# Share of single problems in composed data that are not split. The others get one part, which needs the whole question.
SINGLE_DIRECT_SHARE = 0.8


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
    distinct = {letters_of(text): text for text in asked if text.endswith("?")}
    parts = tuple(distinct.values())
    if len(parts) < 2:
        return None
    return Plan(True, parts, "Combine the answers.")


def composed_plan(item: Question, draw: random.Random) -> Plan:
    """A plan of a random kind for a question of `common.problems.composed`.

    - Direct: the question is not split.
    - By reference: the parts are named, as in "What is the answer to (A)?".
    - Partial: at least one of the problems is left out.
    - Self-contained: the parts repeat the text of the problems.

    In a chained question only the first problem is understandable by itself, so it alone is the self-contained plan.
    The second problem alone is the partial one. Single problems are mostly not split. A problem that is too long for a
    subproblem is named by its letter.

    Args:
        item: the question, composed or single.
        draw: random generator.
    """
    if not item.parts:
        if draw.random() < SINGLE_DIRECT_SHARE:
            return Plan(False, ())
        return Plan(True, (_short(re.split(r"(?<=[.!?])\s+", item.question.strip())[-1], "What is asked for?"),))
    kind = draw.choice(COMPOSED_KINDS)
    if kind == DIRECT:
        return Plan(False, ())
    named = [composed.by_reference(letter) for letter in composed.LETTERS[: len(item.parts)]]
    texts = list(map(_short, composed.part_texts(item.question), named))
    if kind == BY_REFERENCE:
        parts = named
    elif item.kind == composed.CHAINED:
        parts = texts[:1] if kind == SELF_CONTAINED else texts[1:]
    else:
        parts = texts if kind == SELF_CONTAINED else draw.sample(texts, draw.randint(1, len(texts) - 1))
    draw.shuffle(parts)
    chained = item.kind == composed.CHAINED
    return Plan(True, tuple(parts), "The answer to (A) is X in (B)." if chained else "Add the answers.")


def _short(text: str, otherwise: str) -> str:
    return text if 0 < len(text) <= MAX_SUBPROBLEM_CHARS else otherwise


def demonstrations(items: Iterable[Question], seed: int) -> Iterator[tuple[Question, Plan]]:
    """Yield (question, plan) for every question that gives a plan. The same seed gives the same plans."""
    draw = random.Random(seed)
    for item in items:
        if item.kind:
            plan: Plan | None = composed_plan(item, draw)
        else:
            plan = socratic_plan(item, draw) if _MARKER in item.answer else generated.demonstrate(item.question, draw)
        if plan is not None:
            yield item, plan


def load_demonstrations(args: SupervisedArgs) -> Plans:
    """The questions of a supervised run with the plans to imitate.

    Raises:
        UserError: if the data cannot be read, or give no plan.
    """
    limit = args.max_samples or (1000 if is_generated(args.dataset) else 1_000_000)
    questions = load_questions(args.dataset, limit=limit, config=args.dataset_config, seed=args.seed)
    found = list(demonstrations(questions, args.seed))
    if not found:
        raise UserError(
            f"--dataset {args.dataset} has nothing to imitate: json-plan needs GSM8K's socratic variant "
            "(solution lines 'sub-question ** step'), generated:shares or multi:SOURCE"
        )
    return found
