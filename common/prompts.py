"""All prompts of planner and worker. Training, evaluation and serving take them only from here.

The worker has three styles:

- `instruct`: instructions, for a capable chat model;
- `worked`: instructions and two solved word problems, which keep a smaller model's answers short;
- `few-shot`: solved turns of the demo's kind of problem. A very small model needs them far more than instructions
  (measured in docs/results.md).

No planner prompt contains an example of a subproblem. A small policy would copy it word for word and soon write
nothing else (docs/architecture.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from typing import Any

from common.errors import UserError
from common.problems.generated import Shares

Message = dict[str, str]

_PLANNER_SYSTEM = {
    "full": (
        "You plan how to solve a math word problem. You do not solve it: a worker who sees the problem does the "
        "computing. Decide whether the problem should be split into smaller problems. Reply with one JSON object "
        'and nothing else. Its keys are "should_decompose" (true or false), "subproblems" (a list of strings: '
        "short questions about this problem that can each be answered on their own, so none may need the answer "
        'of another; an empty list when should_decompose is false) and "plan" (a string: how the answers combine '
        "into the final one). Never write a computed result into the plan."
    ),
    "short": 'Split the problem for a worker. Reply in JSON with "should_decompose", "subproblems" and "plan".',
}

_SOLVE_SYSTEM = "You solve math word problems. Think step by step, keep it short and do exact arithmetic."
_ANSWER_FORMAT = 'End with a line of JSON that holds just the number: {"final_answer": <number>}'


def planner_messages(question: str, style: str = "full") -> list[Message]:
    """The planner's prompt for one question.

    Args:
        question: the word problem.
        style: `full` or `short` instructions.
    """
    return [{"role": "system", "content": _PLANNER_SYSTEM[style]}, {"role": "user", "content": question}]


def direct_messages(question: str, style: str = "instruct") -> list[Message]:
    """The worker's prompt for a whole question, which it solves step by step.

    Args:
        question: the word problem.
        style: `instruct`, `worked` or `few-shot`; see the module.
    """
    if style == "few-shot":
        return [*_DIRECT_TURNS, {"role": "user", "content": question}]
    return [*_opening(_WORKED_DIRECT, style), {"role": "user", "content": _asked_directly(question)}]


def subproblem_messages(subproblem: str, question: str, style: str = "instruct") -> list[Message]:
    """The worker's prompt for one subproblem.

    Args:
        subproblem: the subproblem, as the planner wrote it.
        question: the word problem it belongs to, as context.
        style: `instruct`, `worked` or `few-shot`; see the module.
    """
    if style == "few-shot":
        # The question is left out because it does not help a small model: 91 % of sums are correct with it, 92 %
        # without. Then a subproblem that many questions share is answered only once.
        return [*_SUBPROBLEM_TURNS, {"role": "user", "content": subproblem}]
    return [*_opening(_WORKED_PART, style), {"role": "user", "content": _asked_for_part(subproblem, question)}]


def combine_messages(
    question: str, subproblems: Sequence[str], solutions: Sequence[str], style: str = "instruct"
) -> list[Message]:
    """The worker's prompt that combines the solutions of the subproblems into the final answer.

    Args:
        question: the word problem.
        subproblems: k subproblems.
        solutions: the worker's answers to them (k).
        style: `instruct`, `worked` or `few-shot`; see the module.
    """
    if style == "few-shot":
        return [*_COMBINE_TURNS, {"role": "user", "content": _known(question, solutions)}]
    asked = _asked_to_combine(question, subproblems, solutions)
    return [*_opening(_WORKED_COMBINE, style), {"role": "user", "content": asked}]


def sample_requests(planner_style: str, worker_style: str | None) -> list[list[Message]]:
    """One prompt of each kind that a run uses, for checks such as `check_shown`.

    Args:
        planner_style: see `planner_messages`.
        worker_style: see the module; None leaves out the worker's prompts.
    """
    question, part = "A shelf holds 4 boxes of 6 pens each. Ada takes 5 pens. How many are left?", "What is 4 * 6?"
    found = [planner_messages(question, planner_style)]
    if worker_style is not None:
        found += [
            direct_messages(question, worker_style),
            subproblem_messages(part, question, worker_style),
            combine_messages(question, [part], ["4 * 6 = 24"], worker_style),
        ]
    return found


def _opening(worked: Sequence[Message], style: str) -> Sequence[Message]:
    """The messages before the request: the system message, and for `worked` also solved turns."""
    return worked if style == "worked" else worked[:1]


def _asked_directly(question: str) -> str:
    return f"{question}\n\n{_ANSWER_FORMAT}"


def _asked_for_part(subproblem: str, question: str) -> str:
    return (
        f"The whole problem, for context only:\n{question}\n\nAnswer just this part of it:\n"
        f"{subproblem}\n\n{_ANSWER_FORMAT}"
    )


def _asked_to_combine(question: str, subproblems: Sequence[str], solutions: Sequence[str]) -> str:
    known = "\n\n".join(
        f"Part {number}: {part}\nSolution: {found}"
        for number, (part, found) in enumerate(zip(subproblems, solutions, strict=True), start=1)
    )
    return (
        f"{question}\n\nParts that were already solved:\n\n{known}\n\n"
        f"Use them to answer the whole problem. {_ANSWER_FORMAT}"
    )


def _known(question: str, solutions: Sequence[str]) -> str:
    """The request to combine in the few-shot style: only the results, and the question's last sentence.

    The working and the numbers of the whole question distract a small model. Test: 64 problems of six people, split
    into pairs. With the question before the results it combined 31 % correctly, without it 73 %.
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


def _steps(amounts: Sequence[int]) -> str:
    """A sum, computed term by term in words."""
    total = amounts[0]
    lines: list[str] = []
    for amount in amounts[1:]:
        lines.append(f"{'Then' if lines else 'First'}, {total} + {amount} = {total + amount}.")
        total += amount
    return " ".join([*lines, f"The answer is {total}."])


def _pair_sums(amounts: Sequence[int]) -> list[int]:
    return [sum(amounts[start : start + 2]) for start in range(0, len(amounts), 2)]


def _answer(*steps: str, number: int) -> str:
    """One step per line, and then the line of JSON that the worker is asked for."""
    return "\n".join([*steps, json.dumps({"final_answer": number})])


# Two problems, the steps of their solutions, and subproblems that some of the steps answer.
_BAKER = (
    "A baker fills 6 trays with 12 rolls each. He sells 44 rolls in the morning and half of the rest in the afternoon. "
    "How many rolls are left?"
)
_BAKER_STEPS = (
    "He bakes 6 * 12 = 72 rolls.",
    "After the morning 72 - 44 = 28 rolls are left.",
    "In the afternoon he sells 28 / 2 = 14 rolls.",
    "So 28 - 14 = 14 rolls are left.",
)
_BAKED = ("How many rolls does he bake?", _answer(*_BAKER_STEPS[:1], number=72))
_MORNING = ("How many rolls are left after the morning?", _answer(*_BAKER_STEPS[:2], number=28))
_BIKE = "Ida saves $15 a week for 8 weeks. A bike costs $200, and the shop takes 10% off. How much is she short of?"
_BIKE_STEPS = (
    "She saves 15 * 8 = 120 dollars.",
    "The discount is 200 * 10 / 100 = 20 dollars.",
    "The bike costs 200 - 20 = 180 dollars.",
    "She is short of 180 - 120 = 60 dollars.",
)
_SAVED = ("How much does she save?", _answer(*_BIKE_STEPS[:1], number=120))
_PRICE = ("What does the bike cost after the discount?", _answer(*_BIKE_STEPS[1:3], number=180))
_WORKED_DIRECT = _turns(
    _SOLVE_SYSTEM,
    (_asked_directly(_BAKER), _answer(*_BAKER_STEPS, number=14)),
    (_asked_directly(_BIKE), _answer(*_BIKE_STEPS, number=60)),
)
_WORKED_PART = _turns(
    _SOLVE_SYSTEM,
    (_asked_for_part(_MORNING[0], _BAKER), _MORNING[1]),
    (_asked_for_part(_SAVED[0], _BIKE), _SAVED[1]),
)
_WORKED_COMBINE = _turns(
    _SOLVE_SYSTEM,
    (_asked_to_combine(_BAKER, *zip(_BAKED, _MORNING, strict=True)), _answer(*_BAKER_STEPS[2:], number=14)),
    (_asked_to_combine(_BIKE, *zip(_SAVED, _PRICE, strict=True)), _answer(*_BIKE_STEPS[3:], number=60)),
)

# The few-shot problems are like those of the demo, with other names and things. The number of turns and the wording of
# the steps were chosen by measurement, above all for direct solving: a weak baseline would prove nothing.
_SHOTS = (
    Shares(("Rob", "Zoe", "Nia", "Max", "Tom", "Una"), (2, 2, 5, 1, 4, 3), "stickers"),
    Shares(("Zoe", "Val", "Tom", "Una", "Pam", "Kim"), (1, 5, 4, 2, 3, 1), "keys"),
    Shares(("Una", "Oli", "Val", "Nia", "Rob", "Pam"), (3, 4, 2, 5, 1, 2), "apples"),
    Shares(("Max", "Kim", "Una", "Pam", "Oli", "Zoe"), (5, 3, 1, 4, 2, 4), "stickers"),
)
_DIRECT_TURNS = _turns(
    "Solve the math problem step by step.", *((shot.question, _steps(shot.amounts)) for shot in _SHOTS)
)
_SUBPROBLEM_TURNS = _turns(
    "Solve the math problem.",
    ("What is 2 + 2?", "2 + 2 = 4"),
    ("What is 5 + 4?", "5 + 4 = 9"),
    ("What is 2 + 1?", "2 + 1 = 3"),
    ("What is 1 + 5?", "1 + 5 = 6"),
)
_COMBINE_TURNS = _turns(
    "Use the known results to solve the math problem.",
    *(
        (_known(shot.question, [str(part) for part in parts]), _steps(parts))
        for shot in _SHOTS[:3]
        for parts in [_pair_sums(shot.amounts)]
    ),
)

# For base models whose tokenizer has no chat template: the roles become headings.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}\n"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The same prompt, with the system message put into the first user message, for chat templates without that role.

    Such templates refuse a system message (Gemma) or leave it out.
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
    """A text that UTF-8 can encode. Bytes of the command line that Python could not decode are decoded as UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # half of a surrogate pair: models write them, and their text goes into prompts
        return text.encode("utf-8", "replace").decode()


def render(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a prompt as the model reads it, up to the point where the completion begins.

    Raises:
        jinja2.TemplateError, ValueError: if the chat template fails.
        TypeError: if it does not return text.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, re.error) as error:
        # A template is a program: what goes wrong in it is the template's, not ours.
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(text, str):
        raise TypeError(f"the chat template gave {type(text).__name__}, not text: {json.dumps(messages)[:80]}")
    return text


def render_all(tokenizer: Any, requests: Sequence[Sequence[Message]]) -> list[str]:
    """The texts of prompts, in their order.

    The system message is folded into the next one (`fold_system`) if the chat template does not show it.
    """
    fold = not accepts_system(tokenizer)
    return [render(tokenizer, fold_system(messages) if fold else messages) for messages in requests]


def check_shown(tokenizer: Any, requests: Sequence[Sequence[Message]]) -> None:
    """Check that the chat template shows every message of these prompts to the model.

    A template that knows other roles may leave messages out without an error, and the model would answer an
    incomplete prompt. The check looks for single words, because templates may trim or escape texts.

    Args:
        tokenizer: with its chat template.
        requests: prompts, each a list of messages.

    Raises:
        UserError: if the template refuses a prompt or leaves text out; the message shows that text.
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


def fix_date(tokenizer: Any, day: date) -> bool:
    """Write a fixed date into a chat template that asks for today's, so that prompts are the same on every day.

    The template is saved with the adapter. So a merged model, or a server that is given the file, shows the date of
    the training run too.

    Args:
        tokenizer: its chat template is changed.
        day: the date to show.

    Returns:
        Whether the template has a date at all.

    Raises:
        UserError: if the template still shows today's date.
    """
    midnight = datetime.combine(day, time())

    def written(template: str) -> str:
        return _TODAY.sub(lambda call: json.dumps(midnight.strftime(call["format"])), template)

    before = tokenizer.chat_template
    templates = before if isinstance(before, dict) else {"": before}
    fixed = {name: written(template) for name, template in templates.items()}
    tokenizer.chat_template = fixed if isinstance(before, dict) else fixed[""]
    if any(re.search(r"\bstrftime_now\s*\(", template) for template in fixed.values()):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} shows today's date in a way that cannot be fixed for a "
            "run: save the tokenizer with a chat template whose strftime_now has a plain format, and use that folder"
        )
    return fixed != templates


_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")
