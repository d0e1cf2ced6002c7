"""Batched decoding over any Hugging Face causal LM: the inner loop of worker and planner.

Three things make it cheaper than one padded `generate` call, with the same tokens out: what prompts share
(system text, few-shot turns, the question) is run once; rows that have finished leave the batch instead of
riding along to the longest; and the language-model head is applied to the last position only. On a CPU the
shared part is not even copied into every row's cache: see `common.branching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from common.branching import Branched, can_branch, padded, run

# Branching a cache costs a copy; below this many shared tokens recomputing them is as cheap.
MIN_SHARED_PREFIX = 8
# Dropping finished rows copies the cache of the others, so it waits until enough rows are done.
DROP_SHARE = 1 / 8


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all prompts share, at least one token of each left over."""
    # In lexicographic order only the extremes need comparing.
    shortest, longest = min(map(list, prompts)), max(map(list, prompts))
    shared = 0
    for left, right in zip(shortest, longest, strict=False):
        if left != right:
            break
        shared += 1
    return min(shared, min(map(len, prompts)) - 1)


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
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

    Returns:
        B token lists; each ends with the end-of-sequence token unless it was cut off.
    """
    device = next(model.parameters()).device
    shared = shared_prefix_length(prompts) if len(prompts) > 1 else 0
    if shared < MIN_SHARED_PREFIX:
        shared = 0
    prefix = DynamicCache(config=model.config)
    if shared:
        run(model, torch.tensor([list(prompts[0][:shared])], device=device), prefix)
    own = [list(ids[shared:]) for ids in prompts]
    outputs: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # row of the batch → prompt
    done = [False] * len(prompts)
    kind = Branched if can_branch(model) else _Repeated
    with kind(model, prefix, shared, pad_id) as cache:
        logits, mask, positions = cache.read(own, max_new_tokens)  # (B, V), (B, S), (B, 1)
        for step in range(max_new_tokens):
            chosen = _choose(logits, temperature, generator)  # (B,)
            for index, token in zip(alive, chosen.tolist(), strict=True):
                if not done[index]:
                    outputs[index].append(token)
                    done[index] = token in eos_ids
            kept = [row for row, index in enumerate(alive) if not done[index]]
            if not kept or step + 1 == max_new_tokens:
                break
            if len(alive) - len(kept) >= len(alive) * DROP_SHARE:
                keep = torch.tensor(kept, device=device)
                cache.past.batch_select_indices(keep)
                chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
                alive = [alive[row] for row in kept]
            positions = positions + 1
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            logits = cache.run(chosen.unsqueeze(1), mask, positions)
    return outputs


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """The next token of each row: (B, V) → (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # By inverting the cumulative distribution: one random number a row, where `torch.multinomial` draws one for
    # every entry of the vocabulary and takes 3 to 10 times as long on a CPU (docs/performance.md).
    # Rounding the sums to fp32 moves odds of less than 1e-7.
    reached = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    drawn = torch.rand(len(logits), 1, device=logits.device, generator=generator)
    token = torch.searchsorted(reached, drawn * reached[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logits.shape[-1] - 1)  # the product may round up to the very end


class _Repeated:
    """The plain way, for any model and device: the prefix's cache copied for every row."""

    def __init__(self, model: Any, prefix: DynamicCache, shared: int, pad_id: int) -> None:
        self.past = prefix
        self._model, self._shared, self._pad_id = model, shared, pad_id

    def __enter__(self) -> _Repeated:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was set up."""

    def read(self, rows: Sequence[list[int]], room: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run what follows the prefix in every prompt, as one padded batch.

        Returns:
            The next token's logits (B, V), which cached tokens are real (B, S), each row's last position (B, 1).
        """
        if self._shared:
            self.past.batch_repeat_interleave(len(rows))
        tokens, mask = padded(rows, self._pad_id, next(self._model.parameters()).device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0) + self._shared  # (B, S)
        return self.run(tokens, mask, positions), mask, positions[:, -1:]

    def run(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The next tokens (B, Q) of every row; returns logits (B, V). The mask (B, S) says what is real."""
        everything = torch.cat([mask.new_ones(mask.shape[0], self._shared), mask], dim=1)  # (B, P + S)
        return run(self._model, tokens, self.past, everything, positions)
