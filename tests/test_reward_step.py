"""The reward step on plans that a real planner wrote: however it is made fast, every answer stays the plain one's."""

from __future__ import annotations

import hashlib

import numpy as np

from common.pipeline import PipelineExecutor
from common.similarity import Embeddings
from common.workers.local import FrozenWorker
from tests.benchmarks import mix

MAX_TOKENS = 16


def any_vectors(texts: list[str]) -> np.ndarray:
    """Some vector for each text: this module is about answers, not about independence."""
    return np.array([list(hashlib.sha256(text.encode()).digest()) for text in texts], dtype=float)


def test_a_larger_mix_begins_with_the_smaller_one_and_uses_no_completion_twice():
    small, large = mix.grpo_mix(24), mix.grpo_mix(128)
    assert len(large) == 128 and large[:24] == small
    groups = [item for group in mix.load_groups() for item in group]
    assert all(large.count(item) <= groups.count(item) for item in large)


def test_texts_and_token_counts_equal_one_generate_call_per_prompt(smollm2):
    model, tokenizer = smollm2
    plans = mix.grpo_mix(8, (4,))
    plain = mix.GenerateWorker(model, tokenizer, style="instruct", max_tokens=MAX_TOKENS, at_once=False)
    known = {}  # a greedy answer is the same every time: the plain way may remember it too, to keep this test short

    def answer(request):
        key = str(request)
        if key not in known:
            known[key] = plain.generate([request])[0]
        return known[key]

    expected = mix.plain_pipeline(plans, answer, "instruct")
    worker = FrozenWorker(model, tokenizer, style="instruct", max_tokens=MAX_TOKENS)
    results = PipelineExecutor(worker, Embeddings(any_vectors)).execute_batch(plans)
    assert [[*r.solutions, *([r.final] if r.final else [])] for r in results] == expected
    lengths = [len(answers) for answers in expected]
    assert 0 in lengths and 1 in lengths and max(lengths) > 2, "the mix must hold invalid, direct and split plans"
    stats = worker.take_stats()
    assert (stats.requests, stats.generated) == (sum(lengths), len(known))
    assert stats.generated_tokens == sum(found.tokens for found in known.values())
