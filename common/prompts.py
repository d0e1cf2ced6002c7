"""All prompts of planner and worker, for training, evaluation and serving.

The worker has three styles:

- `instruct`: instructions, for a capable chat model;
- `worked`: instructions and two solved word problems, which keep a smaller model's answers short. If the question is
  composed of several problems, the two examples are composed too, of the same number of problems;
- `few-shot`: solved turns with problems like those of the demo. A very small model needs these turns far more than
  instructions (measured in docs/results.md).

The worker's context says what a subproblem's prompt shows besides the subproblem: the whole `question`, or `none` of
it.

No planner prompt contains an example of a subproblem. A small policy would copy it word for word and soon write
nothing else (docs/architecture.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from common import examples
from common.errors import UserError
from common.grading import extract_prediction
from common.problems import composed

Message = dict[str, str]

_PLANNER_SYSTEM = {
    "full": (
        "You plan how to solve a math word problem. You do not solve it: a worker {who} does the "
        "computing. Decide whether the problem should be split into smaller problems. Reply with one JSON object "
        'and nothing else. Its keys are "should_decompose" (true or false), "subproblems" (a list of strings: '
        "{parts}, so none may need the answer "
        'of another; an empty list when should_decompose is false) and "plan" (a string: how the answers combine '
        "into the final one). Never write a computed result into the plan."
    ),
    "short": 'Split the problem for a worker{who}. Reply in JSON with "should_decompose", "subproblems" and "plan".',
}
# Sentences of the planner's prompt about the worker, by planner style and worker context.
_WORKER_SEES = {
    ("full", "question"): {
        "who": "who sees the problem",
        "parts": "short questions about this problem that can each be answered on their own",
    },
    ("full", "none"): {
        "who": "who sees one part at a time, and nothing of this problem beside it,",
        "parts": "complete problems that can be understood alone, each with all the facts and numbers that it needs",
    },
    ("short", "question"): {"who": ""},
    ("short", "none"): {"who": ", who sees each part alone: write parts that can be understood without the rest"},
}

_SOLVE_SYSTEM = "You solve math word problems. Think step by step, keep it short and do exact arithmetic."
_ANSWER_FORMAT = 'End with a line of JSON that holds just the number: {"final_answer": <number>}'


def planner_messages(question: str, style: str = "full", context: str = "question") -> list[Message]:
    """The planner's prompt for one question.

    Args:
        question: the word problem.
        style: `full` or `short` instructions.
        context: of the worker, see the module's docstring.
    """
    system = _PLANNER_SYSTEM[style].format(**_WORKER_SEES[style, context])
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def direct_messages(
    question: str, style: str = "instruct", plan: str = "", *, like_question: bool = True
) -> list[Message]:
    """The worker's prompt for a whole question, which it solves step by step.

    Args:
        question: the word problem.
        style: `instruct`, `worked` or `few-shot`; see the module's docstring.
        plan: a planner's advice to show; "" for none. In style `few-shot` it is not shown.
        like_question: in style `worked`, whether the examples before a composed question are composed too.
    """
    if style == "few-shot":
        return [*_DIRECT_TURNS, {"role": "user", "content": question}]
    worked = _worked_composed(question).direct if like_question and composed.count_parts(question) else _WORKED_DIRECT
    return [*_opening(worked, style), {"role": "user", "content": _asked_directly(question, plan)}]


def subproblem_messages(
    subproblem: str, question: str, style: str = "instruct", context: str = "question"
) -> list[Message]:
    """The worker's prompt for one subproblem.

    Args:
        subproblem: the subproblem, as the planner wrote it.
        question: the word problem it belongs to.
        style: `instruct`, `worked` or `few-shot`; see the module's docstring.
        context: `question` or `none`; see the module's docstring.
    """
    if context == "none" and style != "few-shot":
        return direct_messages(subproblem, style)
    if style == "few-shot":
        # The question is left out because it does not help a small model: 91 % of sums are correct with it, 92 %
        # without it. Without it, a subproblem that many questions share is also answered only once.
        return [*_SUBPROBLEM_TURNS, {"role": "user", "content": subproblem}]
    worked = _worked_composed(question).part if composed.count_parts(question) else _WORKED_PART
    return [*_opening(worked, style), {"role": "user", "content": _asked_for_part(subproblem, question)}]


def combine_messages(
    question: str, subproblems: Sequence[str], solutions: Sequence[str], style: str = "instruct", plan: str = ""
) -> list[Message]:
    """The worker's prompt that combines the solutions of the subproblems into the final answer.

    Args:
        question: the word problem.
        subproblems: k subproblems.
        solutions: the worker's answers to them (k).
        style: `instruct`, `worked` or `few-shot`; see the module's docstring.
        plan: as in `direct_messages`.
    """
    if style == "few-shot":
        return [*_COMBINE_TURNS, {"role": "user", "content": _known(question, solutions)}]
    if style == "worked" and composed.count_parts(question):
        asked = _asked_to_combine_results(question, solutions, plan)
        return [*_worked_composed(question).combine, {"role": "user", "content": asked}]
    asked = _asked_to_combine(question, subproblems, solutions, plan)
    return [*_opening(_WORKED_COMBINE, style), {"role": "user", "content": asked}]


def sample_requests(planner_style: str, worker_style: str | None, context: str = "question") -> list[list[Message]]:
    """One prompt of each kind that a run uses, for checks such as `check_shown`.

    Args:
        planner_style: see `planner_messages`.
        worker_style: see the module's docstring; with None there are no prompts of the worker.
        context: of the worker, see the module's docstring.
    """
    question, part = "A shelf holds 4 boxes of 6 pens each. Ada takes 5 pens. How many are left?", "What is 4 * 6?"
    found = [planner_messages(question, planner_style, context)]
    if worker_style is not None:
        found += [
            direct_messages(question, worker_style),
            subproblem_messages(part, question, worker_style, context),
            combine_messages(question, [part], ["4 * 6 = 24"], worker_style),
        ]
    return found


def _opening(worked: Sequence[Message], style: str) -> Sequence[Message]:
    """The messages before the request: the system message, and in style `worked` also solved turns."""
    return worked if style == "worked" else worked[:1]


def _asked_directly(question: str, plan: str = "") -> str:
    return f"{question}\n\n{_advice(plan)}{_ANSWER_FORMAT}"


def _advice(plan: str) -> str:
    return f"Advice on how to solve it: {plan.strip()}\n\n" if plan.strip() else ""


def _asked_for_part(subproblem: str, question: str) -> str:
    return (
        f"The whole problem, for context only:\n{question}\n\nAnswer just this part of it:\n"
        f"{subproblem}\n\n{_ANSWER_FORMAT}"
    )


def _asked_to_combine(question: str, subproblems: Sequence[str], solutions: Sequence[str], plan: str = "") -> str:
    known = "\n\n".join(
        f"Part {number}: {part}\nSolution: {found}"
        for number, (part, found) in enumerate(zip(subproblems, solutions, strict=True), start=1)
    )
    return (
        f"{question}\n\nParts that were already solved:\n\n{known}\n\n{_advice(plan)}"
        f"Use them to answer the whole problem. {_ANSWER_FORMAT}"
    )


def _asked_to_combine_results(question: str, solutions: Sequence[str], plan: str = "") -> str:
    """The request to combine the parts of a composed question in style `worked`: only the answers of the parts.

    Shown the whole solutions, a small model takes other numbers out of them. A solution without an answer is shown.
    """
    known = "\n".join(
        f"Answer to part {number}: {solution if (result := extract_prediction(solution)) is None else f'{result:f}'}"
        for number, solution in enumerate(solutions, start=1)
    )
    return (
        f"{question}\n\nParts that were already solved:\n{known}\n\n{_advice(plan)}"
        f"Use these answers to answer the whole problem. {_ANSWER_FORMAT}"
    )


def _known(question: str, solutions: Sequence[str]) -> str:
    """The request to combine in the few-shot style: only the results, and the question's last sentence.

    The solution steps and the other numbers of the question distract a small model. This was tested on 64 problems of
    six people, split into pairs. With the question before the results it combined 31 % correctly, without it 73 %.
    """
    results = [solution.split("\n", 1)[0].rpartition("=")[2].strip() for solution in solutions]
    return f"Known results: {' and '.join(results)}. {question.rpartition('. ')[2]}"


def _turns(system: str, *pairs: tuple[str, str]) -> list[Message]:
    """A system message and solved turns: user and assistant messages in alternation."""
    return [{"role": "system", "content": system}] + [
        message
        for asked, answered in pairs
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    ]


_WORKED_DIRECT = _turns(
    _SOLVE_SYSTEM,
    (_asked_directly(examples.BAKER), examples.worked_answer(*examples.BAKER_STEPS, number=14)),
    (_asked_directly(examples.BIKE), examples.worked_answer(*examples.BIKE_STEPS, number=60)),
)
_WORKED_PART = _turns(
    _SOLVE_SYSTEM,
    (_asked_for_part(examples.MORNING[0], examples.BAKER), examples.MORNING[1]),
    (_asked_for_part(examples.SAVED[0], examples.BIKE), examples.SAVED[1]),
)
_WORKED_COMBINE = _turns(
    _SOLVE_SYSTEM,
    (
        _asked_to_combine(
            examples.BAKER, (examples.BAKED[0], examples.MORNING[0]), (examples.BAKED[1], examples.MORNING[1])
        ),
        examples.worked_answer(*examples.BAKER_STEPS[2:], number=14),
    ),
    (
        _asked_to_combine(
            examples.BIKE, (examples.SAVED[0], examples.PRICE[0]), (examples.SAVED[1], examples.PRICE[1])
        ),
        examples.worked_answer(*examples.BIKE_STEPS[3:], number=60),
    ),
)


@dataclass(frozen=True, slots=True)
class _WorkedComposed:
    """Solved turns before a composed question: for the whole question, for a part of it, for combining the parts."""

    direct: list[Message]
    part: list[Message]
    combine: list[Message]


def _worked_composed(question: str) -> _WorkedComposed:
    """Two solved questions like a composed one, with as many problems as it has (at most four)."""
    chained = composed.is_chained(question)
    return _worked_turns(chained, 2 if chained else min(composed.count_parts(question), len(examples.SOLVED) // 2))


@cache
def _worked_turns(chained: bool, count: int) -> _WorkedComposed:
    """The solved turns before a composed question of `count` problems: two examples of each kind of prompt."""
    turns: list[tuple[tuple[str, str], ...]] = []
    for place, start in enumerate((0, len(examples.SOLVED) // 2)):
        parts = examples.FOLLOWING[place] if chained else examples.SOLVED[start : start + count]
        texts = [text for text, _, _ in parts]
        solved = [examples.worked_answer(*steps, number=number) for _, steps, number in parts]
        # Without a line for each result, a small model adds up other numbers than those that it found.
        marked = [
            "\n".join((f"({letter})", *steps, f"Answer to ({letter}): {result}"))
            for letter, (_, steps, result) in zip("ABCD", parts, strict=False)
        ]
        if chained:
            whole, known, number, last = composed.chained_text(texts[0], texts[1]), 1, parts[1][2], parts[1][1]
        else:
            whole, known, number = composed.sum_text(texts), count, sum(n for _, _, n in parts)
            last = tuple(examples.sums_term_by_term([n for _, _, n in parts]))
            marked.append(f"Sum: {', '.join(last)}")
        turns.append(
            (
                (_asked_directly(whole), examples.worked_answer(*marked, number=number)),
                (_asked_for_part(composed.by_reference("A"), whole), solved[0]),
                (_asked_to_combine_results(whole, solved[:known]), examples.worked_answer(*last, number=number)),
            )
        )
    return _WorkedComposed(*(_turns(_SOLVE_SYSTEM, *pairs) for pairs in zip(*turns, strict=True)))


_DIRECT_TURNS = _turns(
    "Solve the math problem step by step.",
    *((shot.question, examples.term_by_term(shot.amounts)) for shot in examples.SHOTS),
)
_SUBPROBLEM_TURNS = _turns("Solve the math problem.", *examples.SUMS)
_COMBINE_TURNS = _turns(
    "Use the known results to solve the math problem.",
    *(
        (_known(shot.question, [str(part) for part in parts]), examples.term_by_term(parts))
        for shot in examples.SHOTS[:3]
        for parts in [examples.pair_sums(shot.amounts)]
    ),
)

# For base models whose tokenizer has no chat template. Each role becomes a heading.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}\n"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Move the system message of a prompt into its first user message.

    Some chat templates refuse a system message (Gemma) or leave it out.
    """
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def accepts_system(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template shows a system message to the model. Some templates refuse or drop it."""
    from jinja2 import TemplateError

    probe = [{"role": "system", "content": "alpha"}, {"role": "user", "content": "omega"}]
    try:
        text = render(tokenizer, probe)
    except (TemplateError, ValueError):
        return False
    return "alpha" in text and "omega" in text


def sendable(text: str) -> str:
    """The text in a form that UTF-8 can encode, for a request to a server.

    Bytes of the command line that Python could not decode are decoded again, as UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # half of a surrogate pair; models can write one, and it then enters prompts
        return text.encode("utf-8", "replace").decode()


def render(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a prompt as the model reads it, up to the beginning of the completion.

    Raises:
        jinja2.TemplateError, ValueError: if the chat template fails.
        TypeError: if it does not return text.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, re.error) as error:
        # A template is a program, so it can raise any error.
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(text, str):
        raise TypeError(f"the chat template gave {type(text).__name__}, not text: {json.dumps(messages)[:80]}")
    return text


def render_all(tokenizer: Any, requests: Sequence[Sequence[Message]]) -> list[str]:
    """The texts of prompts, in their order.

    If the chat template does not show system messages, they are moved into the next message (`fold_system`).
    """
    fold = not accepts_system(tokenizer)
    return [render(tokenizer, fold_system(messages) if fold else messages) for messages in requests]


def check_shown(tokenizer: Any, requests: Sequence[Sequence[Message]]) -> None:
    """Check that the chat template shows every message of these prompts to the model.

    A template that knows only other roles may leave messages out without an error. The model would then answer an
    incomplete prompt. The check searches for single words, because templates may trim or escape texts.

    Args:
        tokenizer: with its chat template.
        requests: prompts, each a list of messages.

    Raises:
        UserError: if the template refuses a prompt or leaves a text out; the message shows that text.
    """
    from jinja2 import TemplateError

    for messages in requests:
        try:
            (text,) = render_all(tokenizer, [messages])
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} refuses the prompts of planner and worker "
                f"({str(error).strip()[:160]}): name a chat model with --base-model"
            ) from error
        for message in messages:
            missing = [word for word in re.findall(r"\w{3,}", message["content"]) if word not in text]
            if missing:
                raise UserError(
                    f"the chat template of {tokenizer.name_or_path} leaves the {message['role']}'s text out of the "
                    f"prompt ({message['content'][:60]!r}): name a chat model with --base-model"
                )
