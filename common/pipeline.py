"""Planner output in, graded answer out: the one pipeline of training, evaluation and serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import prompts
from common.args import TrainingArgs
from common.grading import extract_prediction, parse_gold
from common.plans import Plan, parse_planner_output
from common.similarity import NEUTRAL_INDEPENDENCE, Embeddings, SentenceEncoder, independence_score, relevance
from common.worker import FrozenWorker, Generation, Worker


@dataclass(frozen=True, slots=True)
class PipelineItem:
    """One planner completion to carry out. `planner_tokens` counts the completion with its end token."""

    planner_output: str
    question: str
    ground_truth: str
    planner_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class PipelineResult:
    """What became of one planner completion. Tokens are charged per sample, shared or remembered or not."""

    item: PipelineItem
    plan: Plan | None
    solutions: list[Generation] = field(default_factory=list)
    final: Generation | None = None
    correct: bool = False
    independence: float = NEUTRAL_INDEPENDENCE
    relevance: float = 0.0
    error: str | None = None

    @property
    def decomposed(self) -> bool:
        """Whether a valid plan split the question."""
        return self.plan is not None and self.plan.should_decompose

    @property
    def worker_tokens(self) -> int:
        """Tokens of all the worker's answers to this sample."""
        return sum(answer.tokens for answer in [*self.solutions, self.final] if answer is not None)

    @property
    def total_tokens(self) -> int:
        """Planner completion and all worker answers."""
        return self.item.planner_tokens + self.worker_tokens

    @property
    def answer(self) -> str | None:
        """The final answer as a number, or None where there is none."""
        number = extract_prediction(self.final.text) if self.final is not None else None
        return None if number is None else f"{number:f}"


class PipelineExecutor:
    """Carries out plans with a worker, in two waves over a whole batch.

    Args:
        worker: solves subproblems, combines and solves directly.
        embeddings: for independence and relevance.
        max_subproblems, max_subproblem_chars: a plan beyond them is invalid.
        invalid_plan: what an invalid plan leads to: "fail" (training: nothing is run, the answer is wrong)
            or "direct" (evaluation and serving: the worker solves the question directly).
    """

    def __init__(
        self,
        worker: Worker,
        embeddings: Embeddings,
        *,
        max_subproblems: int = 8,
        max_subproblem_chars: int = 500,
        invalid_plan: str = "fail",
    ) -> None:
        self.worker = worker
        self.embeddings = embeddings
        self._max_subproblems = max_subproblems
        self._max_subproblem_chars = max_subproblem_chars
        self._direct_if_invalid = invalid_plan == "direct"

    def with_fallback(self) -> PipelineExecutor:
        """The same pipeline, in which the worker solves directly what has no valid plan."""
        return PipelineExecutor(
            self.worker,
            self.embeddings,
            max_subproblems=self._max_subproblems,
            max_subproblem_chars=self._max_subproblem_chars,
            invalid_plan="direct",
        )

    def execute_pipeline(
        self, planner_output: str, question: str, ground_truth: str, *, planner_tokens: int = 0
    ) -> PipelineResult:
        """Carry out one planner completion; `execute_batch` is far faster for several."""
        return self.execute_batch([PipelineItem(planner_output, question, ground_truth, planner_tokens)])[0]

    def execute_batch(self, items: Sequence[PipelineItem]) -> list[PipelineResult]:
        """Carry out many planner completions, in order.

        First wave: every subproblem and every direct solve of all items; second wave: every combine.

        Raises:
            ValueError: for a ground truth without a number; what the worker does wrong is in the results.
        """
        golds = [parse_gold(item.ground_truth) for item in items]
        results = [PipelineResult(item, self._parse(item)) for item in items]

        first = [self._first_wave(result) for result in results]
        answers = iter(self.worker.generate([request for requests in first for request in requests]))
        for result, requests in zip(results, first, strict=True):
            found = [next(answers) for _ in requests]
            if result.decomposed:
                result.solutions = found
            elif found:
                result.final = found[0]
            _note_failure(result, found)

        combining = [result for result in results if result.decomposed and result.error is None]
        combines = [
            prompts.combine_messages(
                result.item.question,
                result.plan.subproblems,
                [s.text for s in result.solutions],
                self.worker.style,
            )
            for result in combining
            if result.plan is not None
        ]
        for result, answer in zip(combining, self.worker.generate(combines), strict=True):
            result.final = answer
            _note_failure(result, [answer])

        for result, gold in zip(results, golds, strict=True):
            if result.final is not None and result.error is None:
                result.correct = extract_prediction(result.final.text) == gold
        self._embed(results)
        return results

    def _parse(self, item: PipelineItem) -> Plan | None:
        return parse_planner_output(
            item.planner_output,
            max_subproblems=self._max_subproblems,
            max_subproblem_chars=self._max_subproblem_chars,
            finished=item.finished,
        )

    def _first_wave(self, result: PipelineResult) -> list[list[prompts.Message]]:
        question, style = result.item.question, self.worker.style
        if result.plan is not None and result.plan.should_decompose:
            return [prompts.subproblem_messages(part, question, style) for part in result.plan.subproblems]
        if result.plan is not None or self._direct_if_invalid:
            return [prompts.direct_messages(question, style)]
        return []

    def _embed(self, results: Sequence[PipelineResult]) -> None:
        """Independence and relevance of all split plans, each distinct text encoded once."""
        split = [(result, result.plan) for result in results if result.plan and result.plan.should_decompose]
        texts = [text for result, plan in split for text in (*plan.subproblems, result.item.question)]
        vectors = self.embeddings.vectors(texts) if texts else {}
        for result, plan in split:
            result.independence = independence_score(plan.subproblems, vectors)
            result.relevance = relevance(plan.subproblems, result.item.question, vectors)


def local_executor(args: TrainingArgs, model: Any, tokenizer: Any, encoder: SentenceEncoder) -> PipelineExecutor:
    """The pipeline on a local model (or a function that gives it), as the settings say."""
    worker = FrozenWorker(
        model,
        tokenizer,
        style=args.worker_style,
        max_tokens=args.worker_max_tokens,
        batch_tokens=args.worker_batch_tokens,
        cache_size=args.worker_cache_size,
    )
    return PipelineExecutor(
        worker,
        Embeddings(encoder),
        max_subproblems=args.max_subproblems,
        max_subproblem_chars=args.max_subproblem_chars,
    )


def _note_failure(result: PipelineResult, answers: Sequence[Generation]) -> None:
    for answer in answers:
        if answer.error is not None and result.error is None:
            result.error = answer.error
