"""The frozen worker: solves subproblems, combines their solutions, or solves a question directly.

In training it is the trainer's own model with the adapter off, so one copy of the base weights serves planner and
worker.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import prompts
from common.generation import Generation, WorkerStats
from common.prompts import Message
from common.workers.base import WorkerCalls
from common.workers.memory import AnswerMemory

logger = logging.getLogger(__name__)


@contextmanager
def inference(model: Any, *, adapter: bool) -> Iterator[Any]:
    """Context manager: a trainer's model ready to generate: eval mode, no gradients, adapter on or off.

    Reward functions run in train mode with gradient checkpointing. In that mode transformers silently disables the
    KV cache, and greedy output becomes wrong. A model left in eval mode would break TRL's metrics. So the mode of
    every module is restored afterwards, also after an error.
    """
    import torch

    flags = [(module, module.training) for module in model.modules()]
    wrapped = hasattr(model, "disable_adapter")
    model.eval()
    try:
        with torch.no_grad(), nullcontext() if adapter or not wrapped else model.disable_adapter():
            yield model.get_base_model() if wrapped else model
    finally:
        for module, training in flags:
            module.training = training


class LocalModel:
    """Answers prompts with a local model in batches. Greedy answers are shared and cached.

    Args:
        model: the model, maybe wrapped by PEFT, or a function that returns it. With a function, the worker can be
            created before the trainer that owns the model.
        tokenizer: of the model, with a chat template.
        adapter: whether the adapter is on.
        max_tokens: limit of an answer, in tokens.
        batch_tokens: limit of a micro-batch, in padded tokens of prompts and answers.
        cache_size: greedy answers kept across calls; the least recently used is dropped first. Use 0 for a model
            whose weights change.
        temperature: above 0, answers are sampled, and each request gets its own.
        seed: of sampling. A sample depends on the seed and the request's number, not on the rest of its batch.
        first: number of the first request, if another process answers those before it.
        cpu_dtype: "bfloat16" for matrix products in bf16 on a CPU (`common.decoding.packing`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        adapter: bool,
        max_tokens: int = 256,
        batch_tokens: int = 32768,
        cache_size: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
        first: int = 0,
        cpu_dtype: str = "float32",
    ) -> None:
        self._model: Callable[[], Any] = model if _is_getter(model) else lambda: model
        self._tokenizer = tokenizer
        self._fold_system = not prompts.accepts_system(tokenizer)
        self._adapter = adapter
        self._max_tokens = max_tokens
        self._batch_tokens = batch_tokens
        self._temperature = temperature
        self._seed = seed
        self._next = first
        self._cpu_dtype = cpu_dtype
        self._memory = AnswerMemory(cache_size)
        # Keys and values of shared beginnings of prompts; kept under the same condition as answers.
        self._prefixes: dict[Hashable, Any] | None = {} if cache_size else None
        self._stats = WorkerStats()

    def generate(self, requests: Sequence[Sequence[Message]]) -> list[Generation]:
        """Answer prompts, in their order. Identical prompts are run once; a failure affects only its own prompt."""
        started = time.perf_counter()
        shaped = [prompts.fold_system(request) if self._fold_system else request for request in requests]
        texts = [prompts.render(self._tokenizer, request) for request in shaped]
        # Prompts that differ only in their last message (few-shot turns before it) share most of the prefill.
        kinds = {text: tuple(m["content"] for m in request[:-1]) for text, request in zip(texts, shaped, strict=True)}
        found = self._run(texts, kinds) if self._temperature > 0 else self._greedy(texts, kinds)
        self._stats.requests += len(texts)
        self._stats.failures += sum(answer.error is not None for answer in found)
        self._stats.seconds += time.perf_counter() - started
        return found

    def take_stats(self) -> WorkerStats:
        """The counters since the last call; counting starts again at 0."""
        stats, self._stats = self._stats, WorkerStats()
        return stats

    def _greedy(self, texts: Sequence[str], kinds: dict[str, tuple[str, ...]]) -> list[Generation]:
        found = {text: self._memory.find(text) for text in dict.fromkeys(texts)}
        answers = {text: answer for text, answer in found.items() if answer is not None}
        missing = [text for text in found if text not in answers]
        for text, answer in zip(missing, self._run(missing, kinds), strict=True):
            self._memory.add(text, answer)
            answers[text] = answer
        return [answers[text] for text in texts]

    def save_answers(self, path: Path) -> None:
        """Write the cached answers to a file, for a run that resumes from here.

        The cached keys and values of shared beginnings are dropped, because a resumed run has none either. So both runs
        compute them again from the same batch. In bf16 the order of sums matters (docs/performance.md).

        Raises:
            OSError: if the file cannot be written.
        """
        self._memory.save(path)
        if self._prefixes is not None:
            self._prefixes.clear()

    def load_answers(self, path: Path) -> None:
        """Add the answers in a file of `save_answers`. Nothing happens without a file (an older checkpoint)."""
        self._memory.load(path)

    def _run(self, texts: Sequence[str], kinds: dict[str, tuple[str, ...]]) -> list[Generation]:
        """Run the model on all texts, in micro-batches of similar prompts within the token limit."""
        if not texts:
            return []
        from common.decoding.branching import can_branch
        from common.decoding.packing import packed_linears

        encoded = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        answers: dict[int, Generation] = {}
        started = time.perf_counter()
        with (
            inference(self._model(), adapter=self._adapter) as model,
            packed_linears(model, rows=len(texts), steps=self._max_tokens, cpu_dtype=self._cpu_dtype),
        ):
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            of_texts = [kinds[text] for text in texts]
            stored_once = _stored_once(encoded, of_texts) if can_branch(model) else {}
            batches: list[list[int]] = []
            widest = 0
            for index in sorted(range(len(texts)), key=lambda index: (of_texts[index], len(encoded[index]))):
                width = len(encoded[index]) + self._max_tokens
                if limit is not None and width > limit:
                    reason = f"prompt of {len(encoded[index])} tokens leaves no room in a context of {limit}"
                    answers[index] = Generation("", 0, False, reason)
                    continue
                width -= stored_once.get(of_texts[index], 0)
                if batches and max(widest, width) * (len(batches[-1]) + 1) <= self._batch_tokens:
                    batches[-1].append(index)
                    widest = max(widest, width)
                else:
                    batches.append([index])
                    widest = width
            for batch in batches:
                asked = [_Prompt(encoded[i], kinds[texts[i]], self._next + i) for i in batch]
                answers.update(zip(batch, self._run_batch(model, asked), strict=True))
        self._next += len(texts)
        self._stats.model_seconds += time.perf_counter() - started
        self._stats.generated += len(texts)
        self._stats.generated_tokens += sum(answer.tokens or 0 for answer in answers.values())
        return [answers[index] for index in range(len(texts))]

    def _run_batch(self, model: Any, encoded: Sequence[_Prompt]) -> list[Generation]:
        """Run one micro-batch of prompts. If it fails, run its halves, down to the prompt that fails."""
        if not encoded:
            return []
        import torch

        from common.decoding.decode import decode

        eos_ids = end_token_ids(model, self._tokenizer)
        generators = None
        if self._temperature > 0:
            generators = [torch.Generator().manual_seed(_seed(self._seed, prompt.number)) for prompt in encoded]
        try:
            outputs = decode(
                model,
                [prompt.ids for prompt in encoded],
                max_new_tokens=self._max_tokens,
                eos_ids=eos_ids,
                pad_id=self._tokenizer.pad_token_id,
                temperature=self._temperature,
                generator=generators,
                kinds=[prompt.kind for prompt in encoded],
                prefixes=self._prefixes,
            )
        except Exception as error:  # noqa: BLE001 - whatever failed, only its own samples may fail
            failure = f"{type(error).__name__}: {error}"
            if len(encoded) > 1 and _out_of_memory(error):
                self._lower_budget([prompt.ids for prompt in encoded])
        else:
            texts = self._tokenizer.batch_decode(outputs, skip_special_tokens=True)
            return [
                Generation(text.strip(), len(ids), bool(ids) and ids[-1] in eos_ids)
                for ids, text in zip(outputs, texts, strict=True)
            ]
        # Outside the except block, because the tensors of the failed attempt are freed only after it.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(encoded) == 1:
            return [Generation("", 0, False, failure)]
        middle = len(encoded) // 2
        return [*self._run_batch(model, encoded[:middle]), *self._run_batch(model, encoded[middle:])]

    def _lower_budget(self, failed: Sequence[list[int]]) -> None:
        """Limit later batches to half of one that did not fit into memory, because they would fail too."""
        tokens = len(failed) * (max(map(len, failed)) + self._max_tokens)
        if tokens // 2 < self._batch_tokens:
            self._batch_tokens = tokens // 2
            logger.warning(
                "a batch of %d padded tokens did not fit into memory: at most %d from now on (--worker-batch-tokens)",
                tokens,
                self._batch_tokens,
            )


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt of a micro-batch: its tokens, its kind, and its number among all that a model was asked."""

    ids: list[int]
    kind: Hashable
    number: int


def _stored_once(encoded: Sequence[Sequence[int]], kinds: Sequence[Hashable]) -> dict[Hashable, int]:
    """For each kind of prompt, the number of tokens that all its prompts share: a batch on a CPU stores them once."""
    from common.decoding.sharing import shared_prefix_length

    by_kind: dict[Hashable, list[Sequence[int]]] = {}
    for ids, kind in zip(encoded, kinds, strict=True):
        by_kind.setdefault(kind, []).append(ids)
    return {kind: shared_prefix_length(rows) for kind, rows in by_kind.items() if len(rows) > 1}


def _seed(seed: int, number: int) -> int:
    """A seed for each request of a run: 32 bits, of which torch's generator on a CPU takes no more."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest())


class FrozenWorker(LocalModel, WorkerCalls):
    """The worker on a local model: adapter off, greedy, so a prompt always has the same answer.

    Args:
        style, context: of the prompts, see `common.prompts`.
        (the others): as in `LocalModel`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        style: str = "instruct",
        context: str = "question",
        max_tokens: int = 256,
        batch_tokens: int = 32768,
        cache_size: int = 20000,
        cpu_dtype: str = "float32",
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            adapter=False,
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            cache_size=cache_size,
            cpu_dtype=cpu_dtype,
        )
        self.style, self.context = style, context


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of all tokens that end an answer: the tokenizer's own, and those in the generation config."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


def _out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out. It has its own type on a GPU; on a CPU it is a RuntimeError."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _is_getter(model: Any) -> bool:
    """Whether `model` is a function that returns the model. A model is callable too, so callability is not enough."""
    return callable(model) and not hasattr(model, "parameters")
