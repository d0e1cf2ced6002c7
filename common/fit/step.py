"""What one optimiser step generates at most: completions, worker calls, and how long their prompts are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common import prompts
from common.problems.questions import Question
from common.prompts import Message
from common.settings.grpo import TrainingArgs

LONGEST = 16  # questions with the most characters, among which the longest prompt is looked for
VOTES = 8  # direct solutions a question in the scoreboard's majority vote, about what a plan's tokens pay for


@dataclass(frozen=True, slots=True)
class Wave:
    """Prompts that the worker answers together.

    Args:
        calls: how many, at most.
        shared: tokens that all of them begin with.
        own: tokens of the rest of one, at most.
    """

    calls: int
    shared: int
    own: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one process generates in a step.

    Args:
        questions, completions: of the planner.
        planner_prompt: tokens of the longest.
        solve, combine: the worker's two waves.
        scoreboard: the worker's calls for the held-out questions, before and after training.
    """

    questions: int
    completions: int
    planner_prompt: int
    solve: Wave
    combine: Wave
    scoreboard: Wave | None


def step_of(args: TrainingArgs, questions: Sequence[Question], tokenizer: Any) -> Step:
    """The step of a run, from its settings and the longest of its questions (at least one is needed)."""
    longest = [item.question for item in sorted(questions, key=lambda item: -len(item.question))[:LONGEST]]
    style, completions, parts = args.worker_style, args.batch_size * args.grad_accum, args.max_subproblems
    # Every plan split as far as is allowed. Its subproblems are part of one completion, so they share its room, and
    # the combine prompt repeats them with their solutions; the few-shot style takes the bare results instead.
    room = args.max_completion_length
    solutions = 0 if style == "few-shot" else room + parts * args.worker_max_tokens
    split = _wave(
        tokenizer,
        completions * parts,
        (prompts.subproblem_messages("", text, style) for text in longest),
        room // parts,
    )
    known = ["?"] * parts, ["= 0"] * parts
    combine = _wave(
        tokenizer, completions, (prompts.combine_messages(text, *known, style) for text in longest), solutions
    )
    direct = _wave(tokenizer, completions, [prompts.direct_messages(text, style) for text in longest], 0)
    return Step(
        questions=completions // args.num_generations,
        completions=completions,
        planner_prompt=max(_tokens(tokenizer, prompts.planner_messages(text, args.planner_style)) for text in longest),
        solve=max(split, direct, key=lambda wave: wave.calls * wave.own),
        combine=combine,
        scoreboard=Wave(args.eval_samples * VOTES, direct.shared, direct.own) if args.eval_samples else None,
    )


def _wave(tokenizer: Any, calls: int, requests: Iterable[Sequence[Message]], more: int) -> Wave:
    """A wave from sample prompts, each with so many tokens more."""
    longest, messages = max(((_tokens(tokenizer, messages), messages) for messages in requests), key=lambda one: one[0])
    shared = sum(len(tokenizer(message["content"]).input_ids) for message in messages[:-1])
    return Wave(calls, shared, max(0, longest - shared) + more)


def _tokens(tokenizer: Any, messages: Sequence[Message]) -> int:
    (text,) = prompts.render_all(tokenizer, [messages])
    return len(tokenizer(text, add_special_tokens=False).input_ids)
