"""Batched decoding over any Hugging Face causal LM: the inner loop of the frozen worker.

Three things make it cheaper than one padded `generate` call, with the same tokens out:
the part that all prompts share (system text, few-shot turns) is run once and its KV cache branched;
rows that have finished leave the batch instead of riding along to the longest; and the language-model
head is applied to the last position only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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
    from transformers import DynamicCache

    device = next(model.parameters()).device
    shared = shared_prefix_length(prompts)
    cache = DynamicCache(config=model.config)
    if len(prompts) > 1 and shared >= MIN_SHARED_PREFIX:
        prefix = torch.tensor([list(prompts[0][:shared])], device=device)  # (1, P)
        model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    else:
        shared = 0

    width = max(map(len, prompts)) - shared
    rows = [[pad_id] * (width - len(ids) + shared) + list(ids[shared:]) for ids in prompts]
    masks = [[1] * shared + [0] * (width - len(ids) + shared) + [1] * (len(ids) - shared) for ids in prompts]
    tokens = torch.tensor(rows, device=device)  # (B, S)
    mask = torch.tensor(masks, device=device)  # (B, P + S)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, shared:]  # (B, S)

    outputs: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # row of the batch → prompt
    done = [False] * len(prompts)
    for step in range(max_new_tokens):
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if temperature > 0:
            odds = torch.softmax(logits.float() / temperature, dim=-1)  # (B, V)
            chosen = torch.multinomial(odds, 1, generator=generator).squeeze(1)  # (B,)
        else:
            chosen = logits.argmax(dim=-1)  # (B,)
        for index, token in zip(alive, chosen.tolist(), strict=True):
            if not done[index]:
                outputs[index].append(token)
                done[index] = token in eos_ids
        kept = [row for row, index in enumerate(alive) if not done[index]]
        if not kept or step + 1 == max_new_tokens:
            break
        positions = positions[:, -1:] + 1  # (B, 1)
        tokens = chosen.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        if len(alive) - len(kept) >= len(alive) * DROP_SHARE:
            keep = torch.tensor(kept, device=device)
            cache.batch_select_indices(keep)
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            alive = [alive[row] for row in kept]
    return outputs
