"""From a planner's completion to a graded answer. Training, evaluation and serving use the same pipeline."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from common import models, prompts
from common.generation import Generation
from common.grading import extract_prediction, numbers_in, numbers_in_words, parse_gold, values_in
from common.plans import MAX_SUBPROBLEM_CHARS, MAX_SUBPROBLEMS, Plan, after_reasoning, parse_planner_output
from common.settings.grpo import TrainingArgs
from common.similarity import NEUTRAL_INDEPENDENCE, Embeddings, SentenceEncoder, independence_score, relevance
from common.workers.base import ConcurrentWorker, Worker
from common.workers.local import FrozenWorker
from common.workers.remote import ServerWorker

# The work on one completion. It yields prompts that may be answered together, receives their answers, and finally
# returns the result.
Steps = Generator[list[list[prompts.Message]], list[Generation], "PipelineResult"]
# Called with the wave (0: subproblems or direct solving, 1: combining), the index within it, and the answer.
OnAnswer = Callable[[int, int, Generation], None]


@dataclass(frozen=True, slots=True)
class PipelineItem:
    """One planner completion to execute.

    Attributes:
        planner_output: text of the completion.
        question: the word problem.
        ground_truth: the known answer in GSM8K's form (`… #### 7`); None if unknown. Then nothing is graded.
        planner_tokens: tokens of the completion, end-of-sequence token included; None if unknown.
        finished: False if the completion was cut off.
    """

    planner_output: str
    question: str
    ground_truth: str | None
    planner_tokens: int | None = 0
    finished: bool = True

    @property
    def gold(self) -> Decimal:
        """The known answer as a number.

        Raises:
            ValueError: if the answer is unknown or holds no number.
        """
        return parse_gold(self.ground_truth or "")


@dataclass(slots=True)
class PipelineResult:
    """The result of one planner completion. Its tokens include those of answers that other completions use too.

    Attributes:
        item: the completion.
        plan: the valid plan, or None.
        solutions: the worker's answers to the subproblems.
        final: the worker's final answer, from combining or from direct solving.
        correct: whether the final answer equals the known one.
        independence: of the subproblems, in [0, 1]; see `common.similarity.independence_score`.
        relevance: of the subproblems to the question, in [−1, 1]; see `common.similarity.relevance`.
        plan_shown: whether the worker was shown the plan's text.
        error: why the worker failed; None if it did not.
    """

    item: PipelineItem
    plan: Plan | None
    solutions: list[Generation] = field(default_factory=list)
    final: Generation | None = None
    correct: bool = False
    independence: float = NEUTRAL_INDEPENDENCE
    relevance: float = 0.0
    plan_shown: bool = False
    error: str | None = None

    @property
    def decomposed(self) -> bool:
        """Whether there is a valid plan that splits the question."""
        return self.plan is not None and self.plan.should_decompose

    @property
    def contains_answer(self) -> bool:
        """Whether the plan contains the known answer, as a number that the question does not contain.

        It may be in digits, in words ("forty-two"), or, in the plan's text, an expression with that value ("6 * 7").
        A subproblem may be such an expression, because the worker computes it. Numbers that count the parts ("add the
        two answers", "Step 2", "2. What is …?") do not tell an answer.
        """
        gold, question = self.item.gold, self.item.question
        if self.plan is None or gold in numbers_in(question) | numbers_in_words(question):
            return False
        written = "\n".join([*self.plan.subproblems, self.plan.plan])
        counts_parts = 0 < gold <= max(2, len(self.plan.subproblems))
        return (
            gold in numbers_in(_COUNTING.sub(" ", written) if counts_parts else written)
            or (not counts_parts and gold in numbers_in_words(written))
            or gold in values_in(self.plan.plan)
        )

    @property
    def earned(self) -> bool:
        """Whether the worker found the right answer itself: it was not shown a plan that contains the answer."""
        return self.correct and not (self.plan_shown and self.contains_answer)

    @property
    def worker_answers(self) -> list[Generation]:
        """All answers of the worker to this sample, including failed ones."""
        return [*self.solutions, *([] if self.final is None else [self.final])]

    @property
    def worker_tokens(self) -> int | None:
        """Tokens of all the worker's answers to this sample; None if the count of one of them is unknown."""
        counts = [answer.tokens for answer in self.worker_answers]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    @property
    def total_tokens(self) -> int | None:
        """Tokens of the planner's completion and of all worker answers; None if one of the counts is unknown."""
        planner, worker = self.item.planner_tokens, self.worker_tokens
        return None if planner is None or worker is None else planner + worker

    @property
    def number(self) -> Decimal | None:
        """The number in the final answer. If that was cut off, only an explicit one counts (see `common.grading`)."""
        return None if self.final is None else extract_prediction(self.final.text, finished=self.final.finished)

    @property
    def answer(self) -> str | None:
        """The number in the final answer, as text."""
        number = self.number
        return None if number is None else f"{number:f}"


# Numbers in a plan that count its parts: "Step 1", "2. ", "the 2 answers".
_COUNTING = re.compile(
    r"\b(?:step|part|problem|subproblem|question|answer|result)s?\s{0,2}[#(]?[0-9]\b|^\s{0,9}\(?[0-9][.):]"
    r"|\b[0-9]\s(?:answers|results|parts|numbers|values|totals|steps|subproblems|amounts)\b",
    re.IGNORECASE | re.MULTILINE,
)


class PipelineExecutor:
    """Executes plans with a worker: in two waves over a whole batch, or each question independently.

    Args:
        worker: solves subproblems, combines their solutions, and solves directly.
        embeddings: for independence and relevance; with None, both are not computed.
        max_subproblems: largest number of subproblems in a valid plan.
        max_subproblem_chars: length limit of a subproblem in a valid plan, in characters.
        plan_to_worker: whether the plan's text is shown to the worker for direct solving and for combining.
        invalid_plan: "fail" for training: an invalid plan is not executed and counts as wrong. "direct" for
            evaluation and serving: the worker then solves the question directly.
    """

    def __init__(
        self,
        worker: Worker,
        embeddings: Embeddings | None,
        *,
        max_subproblems: int = MAX_SUBPROBLEMS,
        max_subproblem_chars: int = MAX_SUBPROBLEM_CHARS,
        plan_to_worker: bool = False,
        invalid_plan: str = "fail",
    ) -> None:
        self.worker = worker
        self.embeddings = embeddings
        self._max_subproblems = max_subproblems
        self._max_subproblem_chars = max_subproblem_chars
        self._plan_to_worker = plan_to_worker
        self._direct_if_invalid = invalid_plan == "direct"

    @classmethod
    def load(cls, args: TrainingArgs) -> PipelineExecutor:
        """The pipeline of the given settings with its models loaded, for use as a library without a trainer.

        Raises:
            UserError: if a model cannot be loaded, or a server of `worker_url` or `vllm_url` cannot be used.
        """
        models.quiet_transformers()  # as the scripts do
        encoder = SentenceEncoder(args.embedding_model)
        encoder.load()
        if args.worker_url is not None or args.vllm_url is not None:
            return run_executor(args, None, None, encoder)
        base = models.load_base(args.base_model, four_bit=models.use_4bit(args), cpu_dtype=models.cpu_dtype(args))
        return run_executor(args, base, models.load_tokenizer(args.base_model), encoder)

    def with_fallback(self) -> PipelineExecutor:
        """The same pipeline, but the worker solves a question with an invalid plan directly."""
        other = copy.copy(self)
        other._direct_if_invalid = True
        return other

    def parse_planner_output(self, text: str, *, finished: bool = True) -> Plan | None:
        """Parse a planner's completion under this executor's limits. Returns None if it contains no valid plan.

        It never raises, for any string. Its time is linear in the length of the text.

        Args:
            text: the completion.
            finished: False if the completion was cut off by its token limit. It then contains no valid plan.
        """
        return parse_planner_output(
            text,
            max_subproblems=self._max_subproblems,
            max_subproblem_chars=self._max_subproblem_chars,
            finished=finished,
        )

    def compute_independence(self, subproblems: Sequence[str]) -> float:
        """Independence of subproblems in [0, 1]: 1 − mean pairwise cosine similarity of their embeddings.

        Fewer than two subproblems give 0.5, which is neutral.

        Raises:
            ValueError: for two or more subproblems, if the executor has no embeddings.
        """
        if len(subproblems) < 2:
            return NEUTRAL_INDEPENDENCE
        if self.embeddings is None:
            raise ValueError("this executor has no embeddings to compare subproblems with: build it with some")
        return independence_score(subproblems, self.embeddings.vectors(subproblems))

    def execute_pipeline(
        self, planner_output: str, question: str, ground_truth: str, *, planner_tokens: int = 0
    ) -> PipelineResult:
        """Execute one planner completion. For several completions `execute_batch` is much faster.

        Args:
            planner_output: text of the completion.
            question: the word problem.
            ground_truth: the known answer in GSM8K's form.
            planner_tokens: tokens of the completion.

        Raises:
            ValueError: if the ground truth has no number.
        """
        return self.execute_batch([PipelineItem(planner_output, question, ground_truth, planner_tokens)])[0]

    def execute_batch(self, items: Sequence[PipelineItem]) -> list[PipelineResult]:
        """Execute many planner completions. The results are in the order of the items.

        With a local model there are two waves: first every subproblem and every direct solution of all items, then
        every combination. With a concurrent worker each item continues as soon as its own answers have arrived.

        Raises:
            ValueError: if a ground truth has no number. Worker failures do not raise; the results report them.
        """
        golds = [item.gold for item in items]
        if isinstance(self.worker, ConcurrentWorker):
            results = self.worker.wait(self._concurrently(items, self.worker))
        else:
            from common.decoding.packing import packing_kept

            with packing_kept():  # without this, the second wave would pack the weights again
                results = self._in_waves(items)
        for result, gold in zip(results, golds, strict=True):
            result.correct = result.error is None and result.number == gold
        if self.embeddings is not None:
            self._embed(results, self.embeddings)
        return results

    async def answer(self, item: PipelineItem, on_answer: OnAnswer | None = None) -> PipelineResult:
        """Execute one completion with a concurrent worker, without grading.

        Args:
            item: the completion.
            on_answer: called with each answer as it arrives.

        Raises:
            TypeError: if the worker can answer only in batches.
        """
        if not isinstance(self.worker, ConcurrentWorker):
            raise TypeError(f"{type(self.worker).__name__} answers in batches only: use execute_batch")
        worker, steps, wave = self.worker, self._steps(item), 0

        async def ask(wave: int, place: int, request: list[prompts.Message]) -> Generation:
            found = await worker.answer(request)
            if on_answer is not None:
                on_answer(wave, place, found)
            return found

        answers: list[Generation] | None = None
        while True:
            try:
                # The first value sent to a generator must be None.
                requests = next(steps) if answers is None else steps.send(answers)
            except StopIteration as done:
                return done.value
            answers = await asyncio.gather(*(ask(wave, place, request) for place, request in enumerate(requests)))
            wave += 1

    async def _concurrently(self, items: Sequence[PipelineItem], worker: ConcurrentWorker) -> list[PipelineResult]:
        return await asyncio.gather(*(self.answer(item) for item in items))

    def _in_waves(self, items: Sequence[PipelineItem]) -> list[PipelineResult]:
        running = {index: self._steps(item) for index, item in enumerate(items)}
        results: dict[int, PipelineResult] = {}
        answers: dict[int, list[Generation]] = {}
        while True:
            asked: dict[int, list[list[prompts.Message]]] = {}
            for index, steps in list(running.items()):
                try:
                    asked[index] = steps.send(answers[index]) if index in answers else next(steps)
                except StopIteration as done:
                    results[index] = done.value
                    del running[index]
            if not asked:
                break
            found = iter(self.worker.generate([request for requests in asked.values() for request in requests]))
            answers = {index: [next(found) for _ in requests] for index, requests in asked.items()}
        return [results[index] for index in range(len(items))]

    def _steps(self, item: PipelineItem) -> Steps:
        """The work on one completion. It is the same for every worker, and for every order of the work."""
        result = PipelineResult(item, self.parse_planner_output(item.planner_output, finished=item.finished))
        question, style, plan = item.question, self.worker.style, result.plan
        advice = plan.plan if plan is not None and self._plan_to_worker else ""
        result.plan_shown = bool(advice.strip())
        if plan is not None and plan.should_decompose:
            context = self.worker.context
            result.solutions = yield [
                prompts.subproblem_messages(part, question, style, context) for part in plan.subproblems
            ]
            _note_failure(result, result.solutions)
            if result.error is None:
                # The reasoning of a reasoning worker is not part of its solution.
                solutions = [after_reasoning(solution.text).strip() for solution in result.solutions]
                (result.final,) = yield [prompts.combine_messages(question, plan.subproblems, solutions, style, advice)]
        elif plan is not None or self._direct_if_invalid:
            (result.final,) = yield [prompts.direct_messages(question, style, advice)]
        if result.final is not None:
            _note_failure(result, [result.final])
        return result

    def _embed(self, results: Sequence[PipelineResult], embeddings: Embeddings) -> None:
        """Compute independence and relevance of all plans that split. Each distinct text is encoded once."""
        split = [(result, result.plan) for result in results if result.plan and result.plan.should_decompose]
        texts = [text for result, plan in split for text in (*plan.subproblems, result.item.question)]
        vectors = embeddings.vectors(texts) if texts else {}  # one batch; the calls below use the cached vectors
        for result, plan in split:
            result.independence = self.compute_independence(plan.subproblems)
            result.relevance = relevance(plan.subproblems, result.item.question, vectors)


def run_executor(args: TrainingArgs, model: Any, tokenizer: Any, encoder: SentenceEncoder) -> PipelineExecutor:
    """The pipeline for the settings of a run.

    Args:
        args: settings; if they name a server, the worker is the server's model.
        model: the local model, or a function that returns it.
        tokenizer: of the model.
        encoder: for independence and relevance.
    """
    worker: Worker
    if args.worker_url is not None or args.vllm_url is not None:
        worker = ServerWorker.from_settings(args, tokenizer)
    else:
        worker = FrozenWorker(
            model,
            tokenizer,
            style=args.worker_style,
            context=args.worker_context,
            max_tokens=args.worker_max_tokens,
            batch_tokens=args.worker_batch_tokens,
            cache_size=args.worker_cache_size,
            cpu_dtype=models.cpu_dtype(args),
        )
    return PipelineExecutor(
        worker,
        Embeddings(encoder),
        max_subproblems=args.max_subproblems,
        max_subproblem_chars=args.max_subproblem_chars,
        plan_to_worker=args.plan_to_worker,
    )


def _note_failure(result: PipelineResult, answers: Sequence[Generation]) -> None:
    for answer in answers:
        if answer.error is not None and result.error is None:
            result.error = answer.error
