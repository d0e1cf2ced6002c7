"""The reward of a plan, and the reward function that TRL's `GRPOTrainer` calls.

The rewards of a group's G completions become its advantages: in GRPO (arXiv:2402.03300) the reward minus the group's
mean, divided by its standard deviation (or as `--scale-rewards` says). TRL computes the advantages.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.generation import total_stats
from common.pipeline import PipelineExecutor, PipelineItem, PipelineResult
from common.plans import letters_of, near_plan_credit
from common.problems.composed import count_parts
from common.processes import ranks
from common.reports.step_clock import StepClock
from common.settings.grpo import TrainingArgs

logger = logging.getLogger(__name__)

FAILED_BATCHES_BEFORE_STOP = 3  # consecutive batches in which every worker call failed


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """Weights of the documented reward formula, and of its two optional additions, which are off by default.

    Attributes:
        correctness: of a correct answer.
        token: of token efficiency.
        independence: of the independence of the subproblems.
        max_tokens: number of tokens at which token efficiency is 0.
        format: of the format credit for an invalid plan that is nearly valid JSON; 0 turns it off.
        gate_on_correct: whether a wrong answer earns 0, whatever its efficiency and independence.
    """

    correctness: float = TrainingArgs.correctness_weight
    token: float = TrainingArgs.token_weight
    independence: float = TrainingArgs.independence_weight
    max_tokens: int = TrainingArgs.max_tokens
    format: float = TrainingArgs.format_weight
    gate_on_correct: bool = TrainingArgs.gate_on_correct

    @classmethod
    def from_settings(cls, args: TrainingArgs) -> RewardWeights:
        """The weights in the settings of a run."""
        return cls(
            correctness=args.correctness_weight,
            token=args.token_weight,
            independence=args.independence_weight,
            max_tokens=args.max_tokens,
            format=args.format_weight,
            gate_on_correct=args.gate_on_correct,
        )


def token_efficiency(tokens: int | None, max_tokens: int) -> float | None:
    """1 − tokens / max_tokens, clamped to [0, 1]; None if the number of tokens is unknown."""
    return None if tokens is None else min(1.0, max(0.0, 1 - tokens / max_tokens))


def reward_of(result: PipelineResult, weights: RewardWeights) -> float | None:
    """The reward of one result, by the formula of this project (docs/training.md).

    reward = correctness × correct + token × (1 − tokens / max_tokens) + independence × independence_score

    Here `correct` is 0 or 1, and `tokens` counts the planner's completion and all worker answers. A right answer
    counts as wrong if the worker was shown a plan that contains the answer.

    Returns:
        None if the worker failed or the number of tokens is unknown; TRL then masks the sample. 0 for an invalid plan,
        plus the format credit if that is on. 0 for a wrong answer if `gate_on_correct` is set.
    """
    if result.error is not None:
        return None
    if result.plan is None:
        # finished=False: a completion that is valid JSON, but cut off or beyond a limit, must not earn the full credit.
        return weights.format * near_plan_credit(result.item.planner_output, finished=False) if weights.format else 0.0
    efficiency = token_efficiency(result.total_tokens, weights.max_tokens)
    if efficiency is None:
        return None
    if weights.gate_on_correct and not result.earned:
        return 0.0
    return weights.correctness * result.earned + weights.token * efficiency + weights.independence * result.independence


class PipelineRewardFunction:
    """The reward function of a GRPO run: one call scores a whole generation batch.

    Args:
        executor: executes the plans.
        weights: of the formula.
        eos_ids: end-of-sequence tokens. A completion that does not end with one of them was cut off.
        sink: receives the sample records of all processes, in the first process only (for `samples.jsonl` and W&B).
        clock: measures the time of worker and embeddings.

    Raises (when called):
        UserError: if every worker call failed in several consecutive batches.
    """

    __name__ = "pipeline_reward"  # TRL uses this name for its reward metrics

    def __init__(
        self,
        executor: PipelineExecutor,
        weights: RewardWeights,
        *,
        eos_ids: frozenset[int],
        sink: Callable[[list[dict[str, Any]]], None] | None = None,
        clock: StepClock | None = None,
    ) -> None:
        self.executor = executor
        self._clock = clock or StepClock()
        self._weights = weights
        self._eos_ids = eos_ids
        self._sink = sink
        self._failed_batches = 0
        # Returns for each completion of the batch an error message, or None. The code that asks servers replaces it.
        self.rollout_errors: Callable[[], Sequence[str | None]] = tuple

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        question: Sequence[str],
        answer: Sequence[str],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        trainer_state: Any = None,
        **_: Any,
    ) -> list[float | None]:
        """Rewards of B completions; None for a sample to be masked. Every process must call it.

        The logged averages are over the samples of all processes together. A mean of the processes' means would give
        samples unequal weights, because the processes have unequal numbers of samples of each kind.

        Args:
            prompts: not used, because TRL also passes the columns of the data set (question and answer).
            completions: B texts, or B one-message conversations.
            completion_ids: B token lists.
            question, answer: B data set values.
            log_metric, log_extra, trainer_state: passed by TRL.

        Raises:
            UserError: if every worker call failed in several consecutive batches.
        """
        items = [
            PipelineItem(_text(completion), text, gold, len(ids), bool(ids) and ids[-1] in self._eos_ids)
            for completion, ids, text, gold in zip(completions, completion_ids, question, answer, strict=True)
        ]
        results = self.executor.execute_batch(items)
        for result, error in zip(results, self.rollout_errors(), strict=False):
            result.error = result.error or error
        rewards = [reward_of(result, self._weights) for result in results]
        stats = self.executor.worker.take_stats()
        self._clock.add("worker_seconds", stats.seconds)
        if self.executor.embeddings is not None:
            self._clock.add("embedding_seconds", self.executor.embeddings.take_seconds())
        every = ranks.gathered(list(zip(results, rewards, strict=True)))
        everyones = [result for result, _ in every]
        self._stop_if_nothing_works(everyones)
        if log_metric is not None:
            # TRL averages the values that the processes log. Here all processes log the same values.
            for name, value in batch_metrics(everyones, self._weights).items():
                log_metric(name, value)
            log_metric("cache_hit_rate", total_stats(ranks.gathered([stats])).cache_hit_rate)
        if log_extra is not None:
            log_extra("correct", [result.correct for result in results])
            log_extra("independence", [result.independence for result in results])
            log_extra("worker_tokens", [result.worker_tokens for result in results])
        if self._sink is not None and ranks.is_first():
            step = getattr(trainer_state, "global_step", 0) + 1  # the step that these completions train
            self._sink([sample_record(step, result, value, self._weights) for result, value in every])
        return rewards

    def _stop_if_nothing_works(self, results: Sequence[PipelineResult]) -> None:
        # Invalid plans do not reach the worker. If a server failed to give a completion, there is no plan either.
        failed = [result for result in results if result.error is not None and result.plan is not None]
        if failed and ranks.is_first():
            logger.warning("%d of %d samples masked, the worker failed: %s", len(failed), len(results), failed[0].error)
        asked = [result for result in results if result.plan is not None]
        if asked:
            self._failed_batches = self._failed_batches + 1 if len(failed) == len(asked) else 0
        if self._failed_batches >= FAILED_BATCHES_BEFORE_STOP:
            raise UserError(
                f"the worker failed on every sample of {self._failed_batches} batches in a row "
                f"({failed[0].error}): nothing can be learned; lower --worker-batch-tokens or "
                "--worker-max-tokens if memory ran out, then continue with --resume",
                exit_code=1,
            )


def batch_metrics(results: Sequence[PipelineResult], weights: RewardWeights) -> dict[str, float]:
    """Averages over one batch. An average without any sample in this batch is left out.

    A sample whose worker failed has no score. It counts as a worker failure, and in the figures on plans. A sample
    without a completion, because its server failed, counts in no average.
    """
    # If the server failed to give the completion, the sample has neither a valid nor an invalid plan.
    planned = [result for result in results if result.error is None or result.plan is not None]
    scored = [result for result in planned if result.error is None]
    valid = [result for result in scored if result.plan is not None]
    split = [result for result in valid if result.decomposed]
    direct = [result for result in valid if not result.decomposed]
    written = [answer for result in scored for answer in result.worker_answers]
    metrics = {
        "worker_failures": float(len(planned) - len(scored)),
        "invalid_plan_rate": _mean([result.plan is None for result in planned]),
        "planner_tokens": _mean([result.item.planner_tokens for result in planned]),
        "correctness": _mean([result.correct for result in scored]),
        "worker_cut_off_rate": _mean([not answer.finished for answer in written]),
        "no_answer_rate": _mean([result.number is None for result in scored if result.final is not None]),
        "decomposition_rate": _mean([result.decomposed for result in planned]),
        "worker_tokens": _mean([result.worker_tokens for result in scored]),
        "token_efficiency": _mean([token_efficiency(result.total_tokens, weights.max_tokens) for result in valid]),
        "independence": _mean([result.independence for result in valid]),
        "subproblems_per_plan": _mean([len(result.plan.subproblems) for result in split if result.plan]),
        "correct_decomposed": _mean([result.correct for result in split]),
        "correct_direct": _mean([result.correct for result in direct]),
        "plan_contains_answer": _mean([result.contains_answer for result in results if result.plan is not None]),
        **_composed_metrics(planned),
        **_gaming_metrics([result for result in results if result.decomposed]),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def _composed_metrics(planned: Sequence[PipelineResult]) -> dict[str, float | None]:
    """Splits and right answers of composed and of single questions apart; nothing if no question is composed.

    They show whether the planner learns which questions to split (docs/training.md).
    """
    kinds: dict[str, list[PipelineResult]] = {"composed": [], "single": []}
    for result in planned:
        kinds["composed" if count_parts(result.item.question) else "single"].append(result)
    if not kinds["composed"]:
        return {}
    metrics: dict[str, float | None] = {}
    for kind, results in kinds.items():
        metrics[f"decomposition_rate_{kind}"] = _mean([result.decomposed for result in results])
        metrics[f"correctness_{kind}"] = _mean([result.correct for result in results if result.error is None])
    return metrics


def _gaming_metrics(split: Sequence[PipelineResult]) -> dict[str, float | None]:
    """Signs of plans that earn reward without planning (docs/training.md). Each is a share in [0, 1] or a mean."""
    plans: dict[str, set[Any]] = {}
    parts: dict[str, set[Any]] = {}
    for result in split:
        assert result.plan is not None
        plans.setdefault(result.item.question, set()).add(result.plan)
        parts.setdefault(result.item.question, set()).update(result.plan.subproblems)
    return {
        "distinct_plans": _distinct_share(plans),
        "distinct_subproblems": _distinct_share(parts),
        "subproblem_repeats_question": _mean([_repeats_question(result) for result in split]),
        "subproblem_relevance": _mean([result.relevance for result in split]),
    }


def _distinct_share(by_question: dict[str, set[Any]]) -> float | None:
    """Share of entries that occur for one question only: 1 if no two questions share an entry, 0 if all share theirs.

    None with fewer than two questions, because nothing can be compared.
    """
    if len(by_question) < 2:
        return None
    counts = Counter(entry for entries in by_question.values() for entry in entries)
    return sum(count == 1 for count in counts.values()) / counts.total()


def _repeats_question(result: PipelineResult) -> bool:
    """Whether a subproblem contains the whole question, ignoring case, spaces and punctuation."""
    assert result.plan is not None
    question = letters_of(result.item.question)
    return any(question in letters_of(part) for part in result.plan.subproblems)


def sample_record(step: int, result: PipelineResult, reward: float | None, weights: RewardWeights) -> dict[str, Any]:
    """One line of `samples.jsonl`: everything that explains one reward.

    Args:
        step: the optimiser step that uses the completion.
        result: of the pipeline.
        reward: as `reward_of` returned it.
        weights: of the formula.
    """
    plan = result.plan
    return {
        "step": step,
        "question": result.item.question,
        "completion": result.item.planner_output,
        "plan": None
        if plan is None
        else {
            "should_decompose": plan.should_decompose,
            "subproblems": list(plan.subproblems),
            "plan": plan.plan,
        },
        "solutions": [solution.text for solution in result.solutions],
        "final": None if result.final is None else result.final.text,
        "finished": None if result.final is None else result.final.finished,
        "answer": result.answer,
        "gold": f"{result.item.gold:f}",
        "correct": result.correct,
        "plan_contains_answer": result.contains_answer,
        "token_efficiency": token_efficiency(result.total_tokens, weights.max_tokens),
        "independence": result.independence,
        "planner_tokens": result.item.planner_tokens,
        "worker_tokens": result.worker_tokens,
        "reward": reward,
        "error": result.error,
    }


def _text(completion: Any) -> str:
    """The text of a completion: the string itself, or the last message of a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
