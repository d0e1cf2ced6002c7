"""The reward step on plans of a real planner: all ways to speed it up give the same answers as the plain way."""

from __future__ import annotations

import hashlib

import numpy as np

from common.pipeline import PipelineExecutor
from common.similarity import Embeddings
from common.workers.local import FrozenWorker
from tests.benchmarks import mix

MAX_TOKENS = 16


def any_vectors(texts: list[str]) -> np.ndarray:
    """An arbitrary vector for each text, because this module tests answers, not independence."""
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
    known = {}  # greedy answers never change, so the plain way may cache them too, to keep this test short

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
