"""Batched decoding over any Hugging Face causal LM: the inner loop of worker and planner.

What makes it cheaper than one padded `generate` call, with the same tokens out: what prompts share (system text,
few-shot turns, the question) is run once; rows that have finished leave the batch instead of riding along to the
longest; and the language-model head is applied where its result is read only. On a CPU there is no padding either
and nothing shared is copied (`common.decoding.branching`), and the next tokens of greedy answers are guessed, so that
one pass may give a row several (`common.decoding.drafts`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from common.decoding.branching import Branched, Prefixes, can_branch
from common.decoding.drafts import Drafts
from common.decoding.sharing import MIN_SHARED_PREFIX, matching, shared_prefix_length

# Dropping finished rows copies the cache of the others, so it waits until enough rows are done.
DROP_SHARE = 1 / 8


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    kinds: Sequence[Hashable] | None = None,
    prefixes: Prefixes | None = None,
    log_probs: list[list[float]] | None = None,
) -> list[list[int]]:
    """A continuation of each prompt: token by token the most likely one, or sampled.

    Args:
        model: a causal LM in eval mode; its forward takes `past_key_values` and `logits_to_keep`.
        prompts: B token lists, none empty.
        max_new_tokens: longest continuation, end-of-sequence token included.
        eos_ids: tokens that end a continuation.
        pad_id: fills the left of shorter prompts; it may equal an end token.
        temperature: 0 takes the most likely token; above 0 tokens are sampled at this temperature.
        generator: of the samples, on the model's device.
        kinds: equal for prompts that begin alike; all of them without it.
        prefixes: remembers on a CPU what prompts of a kind began with, for a model whose weights do not change.
        log_probs: an empty list, which is filled with B lists of the sampled tokens' log-probabilities at this
            temperature. Only for sampled continuations.

    Returns:
        B token lists; each ends with the end-of-sequence token unless it was cut off.
    """
    by_kind: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds or [None] * len(prompts)):
        by_kind.setdefault(kind, []).append(index)
    branches = can_branch(model)
    if branches:
        batches = [[(kind, index) for kind, mine in by_kind.items() for index in mine]]
    else:
        batches = [[(kind, index) for index in mine] for kind, mine in by_kind.items()]
    outputs: list[list[int]] = [[] for _ in prompts]
    if log_probs is not None:
        log_probs += [[] for _ in prompts]
    for batch in batches:
        rows = [list(prompts[index]) for _, index in batch]
        cache = Branched(model, prefixes) if branches else _Repeated(model, pad_id)
        drafts = Drafts(rows) if isinstance(cache, Branched) and temperature == 0 else None
        found = [outputs[index] for _, index in batch]
        odds = None if log_probs is None else [log_probs[index] for _, index in batch]
        with cache:
            logits = cache.read(rows, [kind for kind, _ in batch], max_new_tokens)
            _continue(cache, logits, found, odds, max_new_tokens, eos_ids, drafts, temperature, generator)
    return outputs


def _continue(
    cache: Branched | _Repeated,
    logits: torch.Tensor,
    outputs: Sequence[list[int]],
    log_probs: Sequence[list[float]] | None,
    most: int,
    eos_ids: frozenset[int],
    drafts: Drafts | None,
    temperature: float,
    generator: torch.Generator | None,
) -> None:
    """Fill the empty outputs of all rows, and their log-probabilities, from their first token's logits (B, V) on."""
    rows = list(range(len(outputs)))  # row of the cache → output
    guesses: list[list[int]] = [[] for _ in rows]  # what was run after the last token of each row
    done = [False] * len(rows)
    while True:
        open_rows = [place for place, row in enumerate(rows) if not done[row]]
        picked = _choose(logits, temperature, generator, len(rows), open_rows)
        if log_probs is not None:  # sampled, so one a row
            odds = torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, picked[:, None])
            for place, value in zip(open_rows, odds[:, 0].tolist(), strict=True):
                log_probs[rows[place]].append(value)
        chosen = picked.tolist()  # one a token that was run
        wrong = [0] * len(rows)
        for place in open_rows:
            row = rows[place]
            real, chosen = chosen[: 1 + len(guesses[place])], chosen[1 + len(guesses[place]) :]
            right = matching(guesses[place], real)
            wrong[place] = len(guesses[place]) - right
            end = next((turn for turn, token in enumerate(real[:right]) if token in eos_ids), right)
            new = real[: end + 1]
            outputs[row] += new
            done[row] = new[-1] in eos_ids or len(outputs[row]) == most
            if drafts is not None:
                drafts.add(row, new)
        if any(wrong):
            cache.forget(wrong)
        left = [place for place in open_rows if not done[rows[place]]]
        if not left:
            return
        if len(rows) - len(left) >= len(rows) * DROP_SHARE:
            cache.select(left)
            rows = [rows[place] for place in left]
            left = list(range(len(rows)))
        guesses = [[] for _ in rows]
        if drafts is not None:
            asked = [rows[place] for place in left]
            found = drafts.guess(asked, [most - len(outputs[row]) - 1 for row in asked])
            for place, guess in zip(left, found, strict=True):
                guesses[place] = guess
        logits = cache.run(
            [[] if done[row] else [outputs[row][-1], *guess] for row, guess in zip(rows, guesses, strict=True)]
        )


def _choose(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None, rows: int, chosen: Sequence[int]
) -> torch.Tensor:
    """The next tokens: (T, V) → (T,). Where sampled, T are the chosen ones of so many rows, finished ones included."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # By inverting the cumulative distribution: one random number a row, where `torch.multinomial` draws one for
    # every entry of the vocabulary and takes 3 to 10 times as long on a CPU (docs/performance.md).
    # Rounding the sums to fp32 moves odds of less than 1e-7.
    reached = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    drawn = torch.rand(rows, 1, device=logits.device, generator=generator)[list(chosen)]
    token = torch.searchsorted(reached, drawn * reached[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logits.shape[-1] - 1)  # the product may round up to the very end


class _Repeated:
    """The plain way, for any model and device: the shared prefix's cache copied for every row of a padded batch."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self._model, self._pad_id, self._device = model, pad_id, next(model.parameters()).device
        self._past = DynamicCache(config=model.config)

    def __enter__(self) -> _Repeated:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was set up."""

    def read(self, prompts: Sequence[list[int]], kinds: Sequence[Hashable], room: int) -> torch.Tensor:
        """Run prompts of one kind: what all share once, the rest as one padded batch.

        Returns:
            The next token's logits (B, V).
        """
        shared = shared_prefix_length(prompts) if len(prompts) > 1 else 0
        if shared < MIN_SHARED_PREFIX:
            shared = 0
        else:
            self._forward(torch.tensor([prompts[0][:shared]], device=self._device))
            self._past.batch_repeat_interleave(len(prompts))
        own = [row[shared:] for row in prompts]
        width = max(map(len, own))
        tokens = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in own], device=self._device)
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in own], device=self._device)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0) + shared  # (B, S)
        self._mask = torch.cat([real.new_ones(len(own), shared), real], dim=1)  # (B, P + S)
        self._positions = positions[:, -1:]
        return self._forward(tokens, positions)

    def run(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run one more token of every row, or none of those that are done; returns the others' logits (T, V)."""
        given = [row for row, new in enumerate(tokens) if new]
        new = torch.tensor([[*some, self._pad_id][:1] for some in tokens], device=self._device)
        self._positions = self._positions + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(new, self._positions)[given]

    def forget(self, counts: Sequence[int]) -> None:
        """Nothing is guessed here."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in ascending order."""
        keep = torch.tensor(rows, device=self._device)
        self._past.batch_select_indices(keep)
        self._mask, self._positions = self._mask[keep], self._positions[keep]

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Run tokens (B, Q) on top of the cache, which grows by them; returns the last position's logits (B, V)."""
        return self._model(
            input_ids=tokens,
            attention_mask=None if positions is None else self._mask,
            position_ids=positions,
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
