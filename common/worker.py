"""The frozen worker: solves subproblems, combines their solutions, or solves a question directly.

In training it is the trainer's own model with the adapter switched off, so that one copy of the base
weights serves both roles.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from common import prompts
from common.prompts import Message


@dataclass(frozen=True, slots=True)
class Generation:
    """A model's answer to one prompt.

    `tokens` counts what was generated, the end-of-sequence token included and padding excluded;
    `finished` is false where the answer was cut off; `error` says why there is no answer.
    """

    text: str
    tokens: int
    finished: bool
    error: str | None = None


@dataclass(slots=True)
class WorkerStats:
    """Counts since the last `take_stats`."""

    requests: int = 0
    generated: int = 0  # requests that were run rather than shared or remembered
    generated_tokens: int = 0
    failures: int = 0
    seconds: float = 0.0

    @property
    def cache_hit_rate(self) -> float:
        """Share of requests answered without running the model (0 where there was none)."""
        return 1 - self.generated / self.requests if self.requests else 0.0


class Worker(Protocol):
    """What the executor needs of a worker, whatever is behind it."""

    style: str

    def generate(self, requests: Sequence[Sequence[Message]]) -> list[Generation]:
        """Answer prompts, in order; one that cannot be answered carries its `error`."""

    def take_stats(self) -> WorkerStats:
        """The counts since the last call, which starts them anew."""


@contextmanager
def frozen(model: Any) -> Iterator[Any]:
    """The base model under a trainer's model: adapter off, eval mode, no gradients.

    Reward functions run in train mode with gradient checkpointing on, where transformers silently drops
    the KV cache and greedy output turns to garbage; and a model left in eval mode breaks TRL's metrics.
    So every module's own flag is put back, also after an error.
    """
    import torch

    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if hasattr(model, "disable_adapter"):
            with torch.no_grad(), model.disable_adapter():
                yield model.get_base_model()
        else:
            with torch.no_grad():
                yield model
    finally:
        for module, training in flags:
            module.training = training


class FrozenWorker:
    """A greedy worker on a local model, batched, deduplicated and with a bounded memory.

    Args:
        model: the (PEFT-wrapped) model, or a function that gives it; the latter lets a worker exist
            before the trainer that owns the model does.
        tokenizer: of the model, with a chat template.
        style: of the prompts, see `common.prompts`.
        max_tokens: longest answer.
        batch_tokens: padded tokens, answer included, of one micro-batch.
        cache_size: greedy answers remembered across calls, least recently used dropped first.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        style: str = "instruct",
        max_tokens: int = 256,
        batch_tokens: int = 32768,
        cache_size: int = 20000,
    ) -> None:
        self._model: Callable[[], Any] = model if _is_getter(model) else lambda: model
        self._tokenizer = tokenizer
        self._fold_system = not prompts.accepts_system(tokenizer)
        self.style = style
        self._max_tokens = max_tokens
        self._batch_tokens = batch_tokens
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Generation] = OrderedDict()
        self._stats = WorkerStats()

    def solve_subproblem(self, subproblem: str, question: str) -> Generation:
        """Answer one subproblem of a question."""
        return self.generate([prompts.subproblem_messages(subproblem, question, self.style)])[0]

    def combine_solutions(self, question: str, subproblems: Sequence[str], solutions: Sequence[str]) -> Generation:
        """Answer a question from its solved subproblems."""
        return self.generate([prompts.combine_messages(question, subproblems, solutions, self.style)])[0]

    def solve_directly(self, question: str) -> Generation:
        """Answer a whole question, steps written out."""
        return self.generate([prompts.direct_messages(question, self.style)])[0]

    def generate(self, requests: Sequence[Sequence[Message]]) -> list[Generation]:
        """Answer prompts, in order. Identical prompts are run once; failures fail only their own prompt."""
        started = time.perf_counter()
        texts = [prompts.render(self._tokenizer, self._shaped(request)) for request in requests]
        answers: dict[str, Generation] = {}
        for text in dict.fromkeys(texts):
            if text in self._cache:
                self._cache.move_to_end(text)
                answers[text] = self._cache[text]
        missing = [text for text in dict.fromkeys(texts) if text not in answers]
        answers.update(self._run(missing))
        self._remember({text: answers[text] for text in missing})
        stats = self._stats
        stats.requests += len(texts)
        stats.generated += len(missing)
        stats.generated_tokens += sum(answers[text].tokens for text in missing)
        stats.failures += sum(answers[text].error is not None for text in texts)
        stats.seconds += time.perf_counter() - started
        return [answers[text] for text in texts]

    def take_stats(self) -> WorkerStats:
        """The counts since the last call, which starts them anew."""
        stats, self._stats = self._stats, WorkerStats()
        return stats

    def _shaped(self, request: Sequence[Message]) -> Sequence[Message]:
        return prompts.fold_system(request) if self._fold_system else request

    def _remember(self, fresh: dict[str, Generation]) -> None:
        for text, answer in fresh.items():
            if answer.error is None:
                self._cache[text] = answer
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    def _run(self, texts: Sequence[str]) -> dict[str, Generation]:
        """Run the model on distinct prompts, in micro-batches of similar length within the token budget."""
        if not texts:
            return {}
        encoded = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
        answers: dict[str, Generation] = {}
        with frozen(self._model()) as model:
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            batch: list[int] = []
            for index in order:
                width = len(encoded[index]) + self._max_tokens
                if limit is not None and width > limit:
                    reason = f"prompt of {len(encoded[index])} tokens leaves no room in a context of {limit}"
                    answers[texts[index]] = Generation("", 0, False, reason)
                    continue
                if batch and width * (len(batch) + 1) > self._batch_tokens:
                    answers.update(self._run_batch(model, texts, encoded, batch))
                    batch = []
                batch.append(index)
            if batch:
                answers.update(self._run_batch(model, texts, encoded, batch))
        return answers

    def _run_batch(
        self, model: Any, texts: Sequence[str], encoded: Sequence[list[int]], batch: Sequence[int]
    ) -> dict[str, Generation]:
        """One micro-batch; if it fails, its halves, down to the single prompt that cannot be answered."""
        import torch

        from common.decoding import greedy_decode

        eos_ids = end_token_ids(model, self._tokenizer)
        try:
            outputs = greedy_decode(
                model,
                [encoded[index] for index in batch],
                max_new_tokens=self._max_tokens,
                eos_ids=eos_ids,
                pad_id=self._tokenizer.pad_token_id,
            )
        except Exception as error:  # noqa: BLE001 - whatever failed, only its own samples may fail
            failure = f"{type(error).__name__}: {error}"
        else:
            decoded = self._tokenizer.batch_decode(outputs, skip_special_tokens=True)
            return {
                texts[index]: Generation(text.strip(), len(ids), bool(ids) and ids[-1] in eos_ids)
                for index, ids, text in zip(batch, outputs, decoded, strict=True)
            }
        # The failed attempt's tensors are freed only here, outside the except block that held them.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            return {texts[batch[0]]: Generation("", 0, False, failure)}
        middle = len(batch) // 2
        return {
            **self._run_batch(model, texts, encoded, batch[:middle]),
            **self._run_batch(model, texts, encoded, batch[middle:]),
        }


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's own and all that the generation config declares."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


def _is_getter(model: Any) -> bool:
    """Whether `model` is a plain function that gives the model (a model is callable too)."""
    return callable(model) and not hasattr(model, "parameters")
