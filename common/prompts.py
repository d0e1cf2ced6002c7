"""Every message the models see. Training, evaluation and serving import them from here and nowhere else.

Two styles for the worker: `instruct` gives instructions to a capable chat model; `few-shot` shows solved
turns, which a small model needs far more than instructions (measured: docs/results.md). No planner prompt
contains an example subproblem: a small policy copies it verbatim and collapses onto it (DESIGN §4.10).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

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
    """The planner's prompt for one question."""
    return [{"role": "system", "content": _PLANNER_SYSTEM[style]}, {"role": "user", "content": question}]


def direct_messages(question: str, style: str = "instruct") -> list[Message]:
    """The worker's prompt for a whole question, to be solved with the steps written out."""
    if style == "few-shot":
        return [*_DIRECT_TURNS, {"role": "user", "content": question}]
    return [
        {"role": "system", "content": _SOLVE_SYSTEM},
        {"role": "user", "content": f"{question}\n\n{_ANSWER_FORMAT}"},
    ]


def subproblem_messages(subproblem: str, question: str, style: str = "instruct") -> list[Message]:
    """The worker's prompt for one subproblem of a question."""
    if style == "few-shot":
        # Without the question: it gains a small model nothing (91 against 92 % of sums right), and a subproblem
        # that many questions share is answered once.
        return [*_SUBPROBLEM_TURNS, {"role": "user", "content": subproblem}]
    return [
        {"role": "system", "content": _SOLVE_SYSTEM},
        {
            "role": "user",
            "content": f"The whole problem, for context only:\n{question}\n\nAnswer just this part of it:\n"
            f"{subproblem}\n\n{_ANSWER_FORMAT}",
        },
    ]


def combine_messages(
    question: str, subproblems: Sequence[str], solutions: Sequence[str], style: str = "instruct"
) -> list[Message]:
    """The worker's prompt that turns the subproblems' solutions into the final answer."""
    if style == "few-shot":
        return [*_COMBINE_TURNS, {"role": "user", "content": _known(question, solutions)}]
    known = "\n\n".join(
        f"Part {number}: {part}\nSolution: {found}"
        for number, (part, found) in enumerate(zip(subproblems, solutions, strict=True), start=1)
    )
    return [
        {"role": "system", "content": _SOLVE_SYSTEM},
        {
            "role": "user",
            "content": f"{question}\n\nParts that were already solved:\n\n{known}\n\n"
            f"Use them to answer the whole problem. {_ANSWER_FORMAT}",
        },
    ]


def _known(question: str, solutions: Sequence[str]) -> str:
    """What the few-shot worker is asked to combine: the results alone, since their derivations distract it.

    Measured on pairs of sums (n = 96): 84 % right with the bare results, 76 % with the equations.
    """
    results = [solution.split("\n", 1)[0].rpartition("=")[2].strip() for solution in solutions]
    return f"Problem: {question}\nKnown results: {' and '.join(results)}"


def _turns(system: str, *pairs: tuple[str, str]) -> list[Message]:
    """A system message and solved turns: alternating user and assistant messages."""
    return [{"role": "system", "content": system}] + [
        message
        for asked, answered in pairs
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    ]


# The few-shot problems are of the kind the demo uses, with other names and things. How many turns, and how the
# steps are worded, was chosen by measurement, for direct solving above all: a weak baseline proves nothing.
_ROB = "Rob has 2 stickers, Zoe has 2, Nia has 2 and Max has 1. How many stickers do they have in all?"
_ZOE = "Zoe has 1 keys, Rob has 5, Tom has 4 and Una has 2. How many keys do they have in all?"
_UNA = "Zoe has 3 keys, Una has 4, Val has 2 and Nia has 2. How many keys do they have in all?"
_PAM = "Val has 1 stickers, Max has 5, Una has 1 and Pam has 4. How many stickers do they have in all?"
_KIM = "Rob has 1 apples, Kim has 4, Oli has 2 and Tom has 3. How many apples do they have in all?"

_DIRECT_TURNS = _turns(
    "Solve the math problem step by step.",
    (_ROB, "First, 2 + 2 = 4. Then, 4 + 2 = 6. Then, 6 + 1 = 7. The answer is 7."),
    (_ZOE, "First, 1 + 5 = 6. Then, 6 + 4 = 10. Then, 10 + 2 = 12. The answer is 12."),
    (_UNA, "First, 3 + 4 = 7. Then, 7 + 2 = 9. Then, 9 + 2 = 11. The answer is 11."),
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
    (_known(_ROB, ["4", "3"]), "4 + 3 = 7"),
    (_known(_ZOE, ["6", "6"]), "6 + 6 = 12"),
    (_known(_UNA, ["7", "4"]), "7 + 4 = 11"),
    (_known(_PAM, ["6", "5"]), "6 + 5 = 11"),
    (_known(_KIM, ["5", "5"]), "5 + 5 = 10"),
)

# For base models whose tokenizer brings no chat template: roles as plain headings.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}\n"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The same prompt without a system message, for chat templates that refuse one (Gemma's, say)."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def accepts_system(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template takes a system message."""
    from jinja2 import TemplateError

    probe = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    try:
        tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):
        return False
    return True


def render(tokenizer: Any, messages: Sequence[Message]) -> str:
    """A prompt as the text the model reads, ending where its answer begins."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    if not isinstance(text, str):
        raise TypeError(f"the chat template gave {type(text).__name__}, not text: {json.dumps(messages)[:80]}")
    return text
