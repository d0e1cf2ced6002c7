"""Upper limits for one optimiser step: numbers of completions and worker calls, and lengths of their prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common import prompts
from common.problems.questions import Question
from common.prompts import Message
from common.settings.grpo import TrainingArgs

LONGEST = 16  # the longest prompt is searched among this many questions with the most characters
VOTES = 8  # assumed votes per question in the scoreboard: direct solutions with as many tokens as a plan and its work


@dataclass(frozen=True, slots=True)
class Wave:
    """Prompts that the worker answers together.

    Attributes:
        calls: largest number of prompts.
        shared: number of tokens that all of them begin with.
        own: largest number of further tokens in one prompt.
    """

    calls: int
    shared: int
    own: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one process generates in a step.

    Attributes:
        questions, completions: numbers of them, of the planner.
        planner_prompt: tokens of the longest planner prompt.
        solve, combine: the worker's two waves.
        scoreboard: the worker's calls for the held-out questions; None without a scoreboard.
    """

    questions: int
    completions: int
    planner_prompt: int
    solve: Wave
    combine: Wave
    scoreboard: Wave | None


def step_of(args: TrainingArgs, questions: Sequence[Question], tokenizer: Any) -> Step:
    """The step of a run, computed from its settings and its longest questions.

    Args:
        args: settings of the run.
        questions: to train on; at least one.
        tokenizer: of the base model.
    """
    longest = _longest(questions)
    style, completions, parts = args.worker_style, args.batch_size * args.grad_accum, args.max_subproblems
    # Assume that every plan has the largest number of subproblems. They are all part of one completion, so they share
    # its length limit. The combine prompt repeats them with their solutions, or in the few-shot style only the results.
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
        planner_prompt=longest_planner_prompt(args, questions, tokenizer),
        solve=max(split, direct, key=lambda wave: wave.calls * wave.own),
        combine=combine,
        scoreboard=Wave(args.eval_samples * VOTES, direct.shared, direct.own) if args.eval_samples else None,
    )


def longest_planner_prompt(args: TrainingArgs, questions: Sequence[Question], tokenizer: Any) -> int:
    """Tokens of the longest planner prompt of these questions, of which there is at least one."""
    return max(
        _tokens(tokenizer, prompts.planner_messages(text, args.planner_style, args.worker_context))
        for text in _longest(questions)
    )


def context_of(config: Any) -> int | None:
    """Tokens that a model was made for; None if its config does not tell."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def _longest(questions: Sequence[Question]) -> list[str]:
    return [item.question for item in sorted(questions, key=lambda item: -len(item.question))[:LONGEST]]


def _wave(tokenizer: Any, calls: int, requests: Iterable[Sequence[Message]], more: int) -> Wave:
    """A wave, from sample prompts that each get `more` additional tokens."""
    longest, messages = max(((_tokens(tokenizer, messages), messages) for messages in requests), key=lambda one: one[0])
    shared = sum(len(tokenizer(message["content"]).input_ids) for message in messages[:-1])
    return Wave(calls, shared, max(0, longest - shared) + more)


def _tokens(tokenizer: Any, messages: Sequence[Message]) -> int:
    (text,) = prompts.render_all(tokenizer, [messages])
    return len(tokenizer(text, add_special_tokens=False).input_ids)
