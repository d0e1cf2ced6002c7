"""The frozen worker on a local model: batches, cached answers, failures."""

from __future__ import annotations

import pytest
import torch

from common import prompts
from common.workers.local import FrozenWorker, LocalModel, inference

SUMS = ["What is 7 + 8 + 5?", "What is 3 + 9?", "What is 21 + 30 + 4?", "What is 2 + 2 + 2 + 2?", "What is 6 + 9 + 1?"]


def test_tokens_count_the_end_token_and_no_padding(smollm2):
    model, tokenizer = smollm2
    worker = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=24)
    short = worker.solve_subproblem("What is 3 + 9?", "")
    assert short.finished
    # the pad token equals the end token here, so counting by id would drop the end token or count padding
    assert short.tokens == len(tokenizer(short.text, add_special_tokens=False).input_ids) + 1
    cut = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=3).solve_subproblem("What is 3 + 9?", "")
    assert (cut.tokens, cut.finished) == (3, False)
    together = worker.generate([prompts.direct_messages(q, "few-shot") for q in SUMS])
    alone = [FrozenWorker(model, tokenizer, style="few-shot", max_tokens=24).solve_directly(q) for q in SUMS]
    assert together == alone


def test_identical_prompts_run_once_and_are_remembered_within_bounds(smollm2):
    model, tokenizer = smollm2
    worker = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=8, cache_size=2)
    ask = [prompts.direct_messages(q, "few-shot") for q in SUMS[:2]]
    first = worker.generate([*ask, *ask, ask[0]])
    stats = worker.take_stats()
    assert (stats.requests, stats.generated) == (5, 2)
    assert stats.cache_hit_rate == pytest.approx(3 / 5)
    assert worker.generate(ask) == first[:2]
    assert worker.take_stats().generated == 0
    worker.generate([prompts.direct_messages(SUMS[2], "few-shot")])  # drops the oldest cached answer
    worker.take_stats()
    worker.generate(ask)
    assert worker.take_stats().generated >= 1
    assert len(worker._memory) <= 2


def test_micro_batches_of_a_token_budget_give_the_same_answers(smollm2):
    model, tokenizer = smollm2
    ask = [prompts.direct_messages(q, "few-shot") for q in SUMS]
    whole = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=16).generate(ask)
    small = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=16, batch_tokens=1)  # one prompt each
    assert small.generate(ask) == whole


def test_a_sampled_answer_depends_on_its_number_and_not_on_its_batch(smollm2):
    """So that a vote has one outcome on any number of processes, and with any budget of a micro-batch."""
    model, tokenizer = smollm2
    asked = [prompts.direct_messages(question, "few-shot") for question in SUMS[:2] for _ in range(2)]

    def sampled(requests: list, **options: int) -> list:
        return LocalModel(
            model, tokenizer, adapter=False, max_tokens=8, temperature=1.5, **{"seed": 3, **options}
        ).generate(requests)

    together = sampled(asked)
    assert sampled(asked[:1]) + sampled(asked[1:], first=1) == together
    assert sampled(asked, batch_tokens=400) == together
    assert together[0] != together[1] or together[2] != together[3], "equal prompts are sampled apart"
    assert sampled(asked, seed=4) != together


def test_a_prompt_that_cannot_be_answered_fails_alone(smollm2):
    model, tokenizer = smollm2
    worker = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=8)
    limit = model.config.max_position_embeddings
    good, bad = worker.generate(
        [prompts.direct_messages(SUMS[0], "few-shot"), prompts.direct_messages("word " * limit, "few-shot")]
    )
    assert good.error is None and good.text
    assert bad.error is not None and str(limit) in bad.error
    assert worker.take_stats().failures == 1


class _FailsOnMarkedPrompts(torch.nn.Module):
    """A real model whose forward raises, like running out of memory, if a marked token is in the batch."""

    def __init__(self, model, marked: int) -> None:
        super().__init__()
        self.inner, self.marked = model, marked
        self.config, self.generation_config = model.config, model.generation_config
        self.set_attn_implementation = model.set_attn_implementation

    def forward(self, input_ids, **kwargs):
        if (input_ids == self.marked).any():
            raise torch.OutOfMemoryError("no memory for this one")
        return self.inner(input_ids=input_ids, **kwargs)


def test_out_of_memory_fails_only_the_prompt_that_causes_it(smollm2):
    model, tokenizer = smollm2
    marked = tokenizer("zebra", add_special_tokens=False).input_ids[0]
    worker = FrozenWorker(_FailsOnMarkedPrompts(model, marked), tokenizer, style="few-shot", max_tokens=8)
    ask = [prompts.direct_messages(q, "few-shot") for q in [*SUMS[:3], "zebra", SUMS[3]]]
    answers = worker.generate(ask)
    assert [answer.error is None for answer in answers] == [True, True, True, False, True]
    assert "no memory" in answers[3].error
    reference = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=8).generate(ask[:3])
    assert answers[:3] == reference
    # a failure is not cached, because the prompt may work later
    assert len(worker._memory) == 4
    # Five prompts of about 500 tokens were too many, and so were some of their halves: later batches are smaller.
    assert worker._batch_tokens < 5 * 600 // 2


def test_inference_restores_every_module_after_an_error(smollm2):
    model, _ = smollm2
    model.train()
    model.lm_head.eval()
    try:
        with pytest.raises(RuntimeError, match="inside"), inference(model, adapter=False) as base:
            assert not any(module.training for module in base.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("inside")
        assert model.model.training and not model.lm_head.training
        assert torch.is_grad_enabled()
    finally:
        model.eval()
