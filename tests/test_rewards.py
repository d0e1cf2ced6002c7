"""The executor's two waves and the exact reward formula, with a worker that answers from a table."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pytest
import torch.distributed as dist

from common.errors import UserError
from common.generation import Generation, WorkerStats
from common.pipeline import PipelineExecutor, PipelineItem, PipelineResult
from common.plans import Plan
from common.problems.composed import part_texts
from common.reports.metrics import summary_table
from common.rewards import (
    PipelineRewardFunction,
    RewardWeights,
    batch_metrics,
    reward_of,
    sample_record,
    token_efficiency,
)
from common.similarity import Embeddings, independence_score

EOS = 9


class TableWorker:
    """Answers from a table whose keys are last user messages, and fails for any other message. Records its batches."""

    style, context = "few-shot", "question"

    def __init__(self, table: dict[str, str], cut_off: tuple[str, ...] = ()) -> None:
        self.table = table
        self.cut_off = cut_off  # answers that are cut off
        self.batches: list[list[str]] = []

    def generate(self, requests):
        asked = [request[-1]["content"] for request in requests]
        self.batches.append(asked)
        return [
            Generation(self.table[text], 10, self.table[text] not in self.cut_off)
            if text in self.table
            else Generation("", 0, False, "out of memory")
            for text in asked
        ]

    def take_stats(self) -> WorkerStats:
        return WorkerStats(requests=4, generated=1)


def vectors(texts: list[str]) -> np.ndarray:
    """Embeddings on axis 0 for texts that start with 'x', on axis 1 for all others. So the cosine is 1 or 0."""
    return np.array([[1.0, 0.0] if text.startswith("x") else [0.0, 2.0] for text in texts])


def combine_text(question: str, parts: list[str], solutions: list[str]) -> str:
    from common.prompts import combine_messages

    return combine_messages(question, parts, solutions, "few-shot")[-1]["content"]


SPLIT = Plan(True, ("x one", "y two"), "add").to_json()
TABLE = {"Q": "The answer is 7", "x one": "3", "y two": "4", combine_text("Q", ["x one", "y two"], ["3", "4"]): "so 7"}


def executor(table: dict[str, str] | None = None, **kwargs) -> tuple[PipelineExecutor, TableWorker]:
    worker = TableWorker(TABLE if table is None else table)
    return PipelineExecutor(worker, Embeddings(vectors), **kwargs), worker


def test_what_a_reasoning_worker_thinks_does_not_reach_the_combine():
    run, _ = executor({**TABLE, "x one": "<think>perhaps 8, no</think>\n3"})
    (result,) = run.execute_batch([PipelineItem(SPLIT, "Q", "#### 7", 20)])
    assert result.error is None and result.correct, "the combine prompt is the one that was asked with plain solutions"


def test_the_whole_batch_takes_two_waves():
    run, worker = executor()
    results = run.execute_batch(
        [
            PipelineItem(SPLIT, "Q", "#### 7", 20),
            PipelineItem(Plan(False, ()).to_json(), "Q", "#### 8", 5),
            PipelineItem("not a plan", "Q", "#### 7", 5),
            PipelineItem(SPLIT, "Q", "#### 7", 20),
        ]
    )
    assert worker.batches == [
        ["x one", "y two", "Q", "x one", "y two"],
        [combine_text("Q", ["x one", "y two"], ["3", "4"])] * 2,
    ]
    assert [result.correct for result in results] == [True, False, False, True]
    # every sample counts all its tokens, also those of shared answers
    assert [result.total_tokens for result in results] == [20 + 30, 5 + 10, 5, 20 + 30]
    assert [result.answer for result in results] == ["7", "7", None, "7"]


def test_exact_formula():
    run, _ = executor()
    weights = RewardWeights(correctness=1.0, token=0.2, independence=0.3, max_tokens=100)
    right = run.execute_pipeline(SPLIT, "Q", "#### 7", planner_tokens=20)
    wrong = run.execute_pipeline(SPLIT, "Q", "#### 6", planner_tokens=20)
    direct = run.execute_pipeline(Plan(False, ()).to_json(), "Q", "#### 7", planner_tokens=20)
    assert right.independence == pytest.approx(1.0)  # orthogonal
    assert reward_of(right, weights) == pytest.approx(1.0 + 0.2 * (1 - 50 / 100) + 0.3 * 1.0)
    assert reward_of(wrong, weights) == pytest.approx(0.2 * (1 - 50 / 100) + 0.3 * 1.0)
    assert reward_of(direct, weights) == pytest.approx(1.0 + 0.2 * (1 - 30 / 100) + 0.3 * 0.5)


def test_invalid_plans_earn_nothing_and_a_truncated_plan_is_invalid():
    run, _ = executor()
    items = [PipelineItem("{", "Q", "#### 7", 3), PipelineItem(SPLIT, "Q", "#### 7", 3, finished=False)]
    for result in run.execute_batch(items):
        assert result.plan is None
        assert reward_of(result, RewardWeights()) == 0.0


def test_format_credit_and_gate_change_nothing_while_off_and_what_they_say_when_on():
    run, _ = executor()
    near = run.execute_pipeline('{"should_decompose": true, "subproblems": [', "Q", "#### 7")
    assert 0 < reward_of(near, RewardWeights(format=0.1)) < 0.1
    wrong = run.execute_pipeline(SPLIT, "Q", "#### 6")
    right = run.execute_pipeline(SPLIT, "Q", "#### 7")
    gate = RewardWeights(gate_on_correct=True)
    assert reward_of(wrong, gate) == 0.0
    assert reward_of(right, gate) == reward_of(right, RewardWeights())


def test_evaluation_solves_directly_what_has_no_valid_plan():
    run, worker = executor(invalid_plan="direct")
    result = run.execute_pipeline("nonsense", "Q", "#### 7")
    assert result.plan is None and result.correct
    assert worker.batches[0] == ["Q"]


@pytest.mark.parametrize(("tokens", "value"), [(0, 1.0), (50, 0.5), (100, 0.0), (250, 0.0)])
def test_token_efficiency_is_clamped(tokens, value):
    assert token_efficiency(tokens, 100) == value


def test_independence_is_one_minus_the_mean_pairwise_cosine():
    generator = np.random.default_rng(0)
    for count in (2, 3, 5):
        raw = generator.normal(size=(count, 8))
        found = Embeddings(lambda texts, raw=raw: raw).vectors([str(i) for i in range(count)])
        unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
        pairs = [unit[i] @ unit[j] for i in range(count) for j in range(i)]
        expected = min(1.0, max(0.0, 1 - sum(pairs) / len(pairs)))
        assert independence_score([str(i) for i in range(count)], found) == pytest.approx(expected)
    same = {"a": np.array([1.0, 0.0])}
    assert independence_score(["a", "a"], same) == 0.0
    assert independence_score(["a"], same) == 0.5
    assert independence_score([], {}) == 0.5


def test_each_distinct_subproblem_is_encoded_once():
    encoded: list[str] = []

    def counting(texts: list[str]) -> np.ndarray:
        encoded.extend(texts)
        return vectors(texts)

    run = PipelineExecutor(TableWorker(TABLE), Embeddings(counting))
    for _ in range(2):
        run.execute_batch([PipelineItem(SPLIT, "Q", "#### 7")] * 3)
    assert sorted(encoded) == ["Q", "x one", "y two"]


def reward_call(reward: PipelineRewardFunction, completions: list[str], logged: dict[str, float]) -> list[float | None]:
    ids = [[1, 2, EOS]] * len(completions)
    return reward(
        prompts=[[]] * len(completions),
        completions=[[{"role": "assistant", "content": text}] for text in completions],
        completion_ids=ids,
        question=["Q"] * len(completions),
        answer=["steps\n#### 7"] * len(completions),
        log_metric=logged.__setitem__,
    )


def test_a_failed_worker_masks_only_its_samples_and_is_counted():
    table = {key: value for key, value in TABLE.items() if key != "y two"}
    run, _ = executor(table)
    logged: dict[str, float] = {}
    records: list[dict] = []
    reward = PipelineRewardFunction(run, RewardWeights(), eos_ids=frozenset({EOS}), sink=records.extend)
    values = reward_call(reward, [SPLIT, Plan(False, ()).to_json()], logged)
    assert values[0] is None and values[1] > 1
    assert logged["worker_failures"] == 1
    assert logged["correctness"] == 1.0  # mean of the samples with a score
    assert records[0]["error"] == "out of memory" and records[0]["reward"] is None
    assert records[1]["solutions"] == [] and records[1]["final"] == "The answer is 7"


def test_a_completion_that_its_server_failed_to_give_is_masked_and_does_not_blame_the_worker():
    run, _ = executor()
    reward = PipelineRewardFunction(run, RewardWeights(), eos_ids=frozenset({EOS}))
    reward.rollout_errors = lambda: [None, "no answer"]
    logged: dict[str, float] = {}
    for _ in range(5):  # more batches than the limit for consecutive worker failures
        scored = reward_call(reward, [SPLIT, ""], logged)
        assert scored[0] is not None and scored[1] is None
    assert logged["worker_failures"] == 0
    assert logged["invalid_plan_rate"] == 0 and logged["planner_tokens"] == 3, "of the one plan that was written"
    assert logged["decomposition_rate"] == 1
    reward.rollout_errors = tuple
    assert reward_call(reward, [SPLIT, ""], logged)[1] == 0, "an empty plan that was written is an invalid one"


def reward_of_a_rank(rank: int, store: str, results) -> None:
    """Rank 0 has one right completion and five invalid ones. Rank 1 has one right one and one whose worker fails."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    run, _ = executor(TABLE if rank == 0 else {key: value for key, value in TABLE.items() if key != "y two"})
    logged: dict[str, float] = {}
    records: list[dict] = []
    reward = PipelineRewardFunction(run, RewardWeights(), eos_ids=frozenset({EOS}), sink=records.extend)
    direct = Plan(False, ()).to_json()
    values = reward_call(reward, [direct, *["no plan"] * 5] if rank == 0 else [direct, SPLIT], logged)
    run.worker.table = {}  # from now on every call fails on rank 1, and rank 0 makes no call
    try:
        for _ in range(3):
            reward_call(reward, ["no plan"] if rank == 0 else [SPLIT], {})
        stopped = "no"
    except UserError as error:
        stopped = str(error)
    dist.destroy_process_group()
    results.put((rank, values, logged, records, stopped))


def test_metrics_are_of_the_samples_of_all_processes(tmp_path):
    """Two gloo processes have unequal samples. They log averages of all samples, and stop together."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=reward_of_a_rank, args=(rank, tmp_path / "store", results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        first, second = sorted(results.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    logged = first[2]
    assert logged == second[2], "or TRL's average of the processes would be another number"
    assert logged["worker_failures"] == 1 and logged["correctness"] == 2 / 7  # the mean of means would be 7/12
    assert logged["invalid_plan_rate"] == 5 / 8 and logged["decomposition_rate"] == 1 / 8
    assert [len(first[1]), len(second[1])] == [6, 2], "rewards stay with their process"
    assert [record["reward"] for record in first[3][:8]] == first[1] + second[1] and second[3] == []
    assert "3 batches in a row" in first[4] and first[4] == second[4]


def test_a_run_in_which_everything_fails_stops_with_a_clear_message():
    run, _ = executor({})
    reward = PipelineRewardFunction(run, RewardWeights(), eos_ids=frozenset({EOS}))
    with pytest.raises(UserError, match=r"3 batches in a row.*out of memory"):
        for _ in range(3):
            assert reward_call(reward, [SPLIT] * 2, {}) == [None, None]
    # a successful batch resets the count of failed ones
    mixed = PipelineRewardFunction(run, RewardWeights(), eos_ids=frozenset({EOS}))
    for _ in range(4):
        run.worker.table = {}
        reward_call(mixed, [SPLIT], {})
        run.worker.table = TABLE
        reward_call(mixed, [SPLIT], {})


def test_metrics_of_template_plans_and_of_cheating_show():
    def item(question: str, *parts: str, gold: int = 42) -> PipelineItem:
        return PipelineItem(Plan(True, parts).to_json(), question, f"#### {gold}")

    questions = ["How much is 1 + 2?", "How much is 3 + 4?", "How much is 5 + 6?"]
    template = [item(question, "x first", "y second") for question in questions]
    tailored = [item(question, question[9:], "y") for question in questions]
    run, _ = executor({})
    found = batch_metrics(run.execute_batch(template), RewardWeights())
    assert found["distinct_plans"] == 0.0 and found["distinct_subproblems"] == 0.0
    found = batch_metrics(run.execute_batch(tailored), RewardWeights())
    assert found["distinct_plans"] == 1.0
    assert found["distinct_subproblems"] == 3 / 6  # "y" occurs in all three
    assert "correctness" not in found  # without a scored sample there is no number, not 0


def test_composed_and_single_questions_are_counted_apart():
    composed = "(A) How much is 1 + 2?\n(B) How much is 3 + 4?\nWhat is the sum of the answers to (A) and (B)?"
    parts = part_texts(composed)
    table = {**dict(zip(parts, "37", strict=True)), combine_text(composed, parts, ["3", "7"]): "10", composed: "11"}
    table["How much is 5?"] = "5"
    run, _ = executor(table)
    direct, split = Plan(False, ()).to_json(), Plan(True, tuple(parts)).to_json()
    composed_items = [PipelineItem(text, composed, "#### 10") for text in (split, direct, direct, "no plan")]
    single = PipelineItem(direct, "How much is 5?", "#### 5")
    found = batch_metrics(run.execute_batch([*composed_items, single]), RewardWeights())
    assert (found["decomposition_rate_composed"], found["correctness_composed"]) == (1 / 4, 1 / 4)
    assert (found["decomposition_rate_single"], found["correctness_single"]) == (0, 1)
    assert not any("composed" in name for name in batch_metrics(run.execute_batch([single]), RewardWeights()))
    assert "- composed questions" in summary_table([found]) and "composed" not in summary_table([{"reward": 1}])


def test_plans_that_repeat_the_question_or_hold_the_answer_are_noticed():
    table = {"how much is 1 + 2": "3", "It is 3": "3", "half": "1"}
    for parts in (["how much is 1 + 2"], ["It is 3"], ["half"]):
        table[combine_text("How much is 1 + 2?", parts, [table[parts[0]]])] = "3"
    run, _ = executor(table)

    def metrics(part: str) -> dict[str, float]:
        result = run.execute_pipeline(Plan(True, (part,)).to_json(), "How much is 1 + 2?", "#### 3")
        return batch_metrics([result], RewardWeights())

    assert metrics("how much is 1 + 2")["subproblem_repeats_question"] == 1.0
    assert metrics("half")["subproblem_repeats_question"] == 0.0
    assert metrics("It is 3")["plan_contains_answer"] == 1.0
    assert metrics("half")["plan_contains_answer"] == 0.0


@pytest.mark.parametrize("decompose", [True, False])
def test_an_answer_that_a_shown_plan_tells_is_not_paid_as_correct(decompose):
    class Parrot(TableWorker):
        """Knows only the last message of its prompt."""

        style, context = "instruct", "none"

        def generate(self, requests):
            self.batches.append([request[-1]["content"] for request in requests])
            return [Generation("7" if "7" in batch else "8", 10, True) for batch in self.batches[-1]]

    def reward(advice: str, shown: bool, gate: bool = False) -> tuple[float | None, bool]:
        worker = Parrot({})
        run = PipelineExecutor(worker, None, plan_to_worker=shown)
        plan = Plan(decompose, ("how many",) if decompose else (), advice)
        result = run.execute_pipeline(plan.to_json(), "How much?", "#### 7")
        assert (advice in worker.batches[-1][0]) == shown and "How much?" not in str(worker.batches[:-1])
        metrics = batch_metrics([result], RewardWeights())
        assert metrics["plan_contains_answer"] == ("7" in advice)
        weights = RewardWeights(gate_on_correct=gate)
        assert sample_record(1, result, None, weights)["plan_contains_answer"] == ("7" in advice)
        return reward_of(result, weights), result.correct

    told, right = reward("It is 7", shown=True)
    advised, wrong = reward("It is odd", shown=True)
    assert right and not wrong and told == advised, "right, but told: paid like a wrong one"
    assert reward("It is 7", shown=True, gate=True) == (0.0, True)
    assert reward("It is 7", shown=False)[1] is False, "nobody reads it"


@pytest.mark.parametrize(
    ("parts", "advice", "gold", "told"),
    [
        ((), "It comes to forty-two.", 42, True),
        ((), "Compute 6 * 7.", 42, True),
        ((), "Take six times seven.", 42, True),
        (("How many pens?", "How many cups?"), "(15 + 28) - 1", 42, True),
        (("Is it forty-two?",), "", 42, True),
        # the worker computes a subproblem; what counts the parts tells nothing; the question tells it itself
        (("What is 6 * 7?",), "Add.", 42, False),
        (("How many pens?", "How many cups?"), "Add the two answers.", 2, False),
        (("1. How many pens?", "2. How many cups?"), "Step 2: add the 2 answers.", 2, False),
        (("1. How many pens?", "2. How many cups?"), "She has 2 left.", 2, True),
        ((), "Add what all twelve have.", 12, False),
        # a single step that is left to do
        ((), "Multiply the boxes by the pens in a box.", 42, False),
    ],
)
def test_a_plan_can_tell_the_answer_in_words_and_as_an_expression(parts, advice, gold, told):
    item = PipelineItem("", "Twelve people count 3 boxes.", f"#### {gold}")
    assert PipelineResult(item, Plan(bool(parts), parts, advice)).contains_answer is told


def test_a_cut_off_answer_counts_only_if_it_is_explicit():
    direct = Plan(False, ()).to_json()
    table = {"explicit": "The answer is 7. To check", "working": "so 7", "no number": "seven", "finished": "so 7"}
    run = PipelineExecutor(TableWorker(table, ("The answer is 7. To check",)), None)
    cut = PipelineExecutor(TableWorker({"working": "so 7"}, ("so 7",)), None)
    items = {name: PipelineItem(direct, name, "#### 7") for name in table}
    results = run.execute_batch([items["explicit"], items["no number"], items["finished"]])
    results += cut.execute_batch([items["working"], items["finished"], PipelineItem("{", "working", "#### 7")])
    assert [result.correct for result in results] == [True, False, True, False, False, False]
    assert [result.answer for result in results] == ["7", None, "7", None, None, None]
    # Of six samples one failed and one had an invalid plan: four answers, two cut off, two without a number.
    metrics = batch_metrics(results, RewardWeights())
    assert metrics["worker_cut_off_rate"] == 2 / 4 and metrics["no_answer_rate"] == 2 / 4
    records = [sample_record(1, result, 0.0, RewardWeights()) for result in results]
    assert [record["finished"] for record in records] == [False, True, True, False, False, None]


def test_cut_off_subproblems_are_counted_too():
    run = PipelineExecutor(TableWorker(TABLE, ("3", "4")), Embeddings(vectors))
    metrics = batch_metrics([run.execute_pipeline(SPLIT, "Q", "#### 7")], RewardWeights())
    assert metrics["worker_cut_off_rate"] == 2 / 3 and metrics["no_answer_rate"] == 0


def test_a_bad_gold_answer_is_an_error_and_not_a_wrong_answer():
    run, _ = executor()
    with pytest.raises(ValueError, match="####"):
        run.execute_pipeline(SPLIT, "Q", "7")
