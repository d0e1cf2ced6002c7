"""Batched decoding over any Hugging Face causal LM: the inner loop of worker and planner.

Three things make it cheaper than one padded `generate` call, with the same tokens out: the part that all
prompts share (system text, few-shot turns) is run once; rows that have finished leave the batch instead of
riding along to the longest; and the language-model head is applied to the last position only. On a CPU the
shared part is not even copied into every row's cache: attention reads it once for the whole batch
(`_branched_attention`), and each row's own cache is written in place instead of being concatenated anew
for every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
    width = max(map(len, prompts)) - shared
    rows = [[pad_id] * (width - len(ids) + shared) + list(ids[shared:]) for ids in prompts]
    real = [[0] * (width - len(ids) + shared) + [1] * (len(ids) - shared) for ids in prompts]
    tokens = torch.tensor(rows, device=device)  # (B, S)
    mask = torch.tensor(real, device=device)  # (B, S), grows by a column a token; 0 is padding
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0) + shared  # (B, S)

    prefix = DynamicCache(config=model.config)
    if shared:
        model(
            input_ids=torch.tensor([list(prompts[0][:shared])], device=device),  # (1, P)
            past_key_values=prefix,
            use_cache=True,
            logits_to_keep=1,
        )
    outputs: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # row of the batch → prompt
    done = [False] * len(prompts)
    branch = _Branched if _can_branch(model) else _Repeated
    with branch(model, prefix, shared, len(prompts), width + max_new_tokens).active() as cache:
        for step in range(max_new_tokens):
            logits = model(
                input_ids=tokens,
                attention_mask=cache.attention_mask(mask, tokens.shape[1]),
                position_ids=positions,
                past_key_values=cache.past,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # (B, V)
            chosen = _choose(logits, temperature, generator)  # (B,)
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
                cache.past.batch_select_indices(keep)
                tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
                alive = [alive[row] for row in kept]
    return outputs


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """The next token of each row: (B, V) → (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    odds = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(odds, 1, generator=generator).squeeze(1)


class _Repeated:
    """The plain way, for any model and device: the prefix's cache copied for every row."""

    def __init__(self, model: Any, prefix: DynamicCache, shared: int, rows: int, room: int) -> None:
        self.past: DynamicCache = prefix
        self._shared = shared
        if shared:
            self.past.batch_repeat_interleave(rows)

    @contextmanager
    def active(self) -> Iterator[_Repeated]:
        """Nothing to set up."""
        yield self

    def attention_mask(self, mask: torch.Tensor, queries: int) -> torch.Tensor:
        """(B, P + S): the prefix is real in every row."""
        return torch.cat([mask.new_ones(mask.shape[0], self._shared), mask], dim=1)


class _BranchedLayer(DynamicLayer):
    """A layer's cache: one prefix for all rows, and room for each row's own tokens, written in place."""

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None, shared: int, room: int) -> None:
        super().__init__()
        self.prefix = (keys, values)  # each (1, Hkv, P, D), or None
        self.shared = shared
        self.room = room
        self.used = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, Hkv, Q, D); returns the rows' own keys and values so far, (B, Hkv, S, D)."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, size = key_states.shape
            self.keys = key_states.new_empty(batch, heads, self.room, size)
            self.values = value_states.new_empty(batch, heads, self.room, size)
        assert self.keys is not None and self.values is not None
        end = self.used + key_states.shape[2]
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens before the next one."""
        return self.shared + self.used


class _Branched:
    """The prefix kept once; see `_branched_attention`."""

    def __init__(self, model: Any, prefix: DynamicCache, shared: int, rows: int, room: int) -> None:
        self._config = model.config
        self._dtype = next(model.parameters()).dtype
        self.past = DynamicCache(config=model.config)
        count = model.config.num_hidden_layers
        layers: list[Any] = list(prefix.layers)
        stored = [(layer.keys, layer.values) for layer in layers] if shared else [(None, None)] * count
        self.past.layers = [_BranchedLayer(keys, values, shared, room) for keys, values in stored]

    @contextmanager
    def active(self) -> Iterator[_Branched]:
        """Attention goes through `_branched_attention` inside."""
        before = self._config._attn_implementation
        token = _active.set(self.past)
        self._config._attn_implementation = _NAME
        try:
            yield self
        finally:
            self._config._attn_implementation = before
            _active.reset(token)

    def attention_mask(self, mask: torch.Tensor, queries: int) -> torch.Tensor:
        """(B, 1, Q, S), to be added to the scores: causal, and never towards padding."""
        total = mask.shape[1]
        causal = torch.ones(queries, total, dtype=torch.bool, device=mask.device).tril(total - queries)
        seen = causal & mask.bool()[:, None, None, :]
        lowest = torch.finfo(self._dtype).min
        return torch.zeros(seen.shape, dtype=self._dtype, device=mask.device).masked_fill(~seen, lowest)


_NAME = "branched"
_active: ContextVar[DynamicCache] = ContextVar("active branched cache")


def _branched_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a prefix that all rows share and over each row's own keys.

    The queries of all rows meet the prefix in one matrix product per key-value head, so that it is read
    once and not once a row; query heads that share a key-value head (GQA) share the product too, instead
    of repeating keys and values for them.

    Args:
        query: (B, Hq, Q, D). key, value: (B, Hkv, S, D), the rows' own. attention_mask: (B, 1, Q, S).

    Returns:
        (B, Q, Hq, D) and None.
    """
    batch, query_heads, queries, size = query.shape
    heads = key.shape[1]
    together = (query_heads // heads) * queries
    grouped = (query * scaling).reshape(batch, heads, together, size)  # (B, Hkv, GQ, D)
    own = grouped @ key.transpose(2, 3)  # (B, Hkv, GQ, S)
    own = (own.view(batch, heads, -1, queries, key.shape[2]) + attention_mask.unsqueeze(2)).view_as(own)
    layer: Any = _active.get().layers[module.layer_idx]
    prefix_key, prefix_value = layer.prefix
    if prefix_key is None:
        odds = torch.softmax(own, dim=-1, dtype=torch.float32).to(query.dtype)
        mixed = odds @ value
    else:
        length = prefix_key.shape[2]
        flat = grouped.transpose(0, 1).reshape(heads, batch * together, size)
        shared = (flat @ prefix_key[0].transpose(1, 2)).view(heads, batch, together, length).transpose(0, 1)
        odds = torch.softmax(torch.cat([shared, own], dim=-1), dim=-1, dtype=torch.float32).to(query.dtype)
        shared_odds = odds[..., :length].transpose(0, 1).reshape(heads, batch * together, length)
        from_prefix = (shared_odds @ prefix_value[0]).view(heads, batch, together, size).transpose(0, 1)
        mixed = odds[..., length:] @ value + from_prefix
    return mixed.reshape(batch, query_heads, queries, size).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _branched_attention)

# Plain causal attention with grouped heads; other architectures (sliding windows, capped scores) take the plain way.
_BRANCHING_TYPES = {"llama", "qwen2", "qwen3", "mistral"}


def _can_branch(model: Any) -> bool:
    config = model.config
    sliding = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (
        next(model.parameters()).device.type == "cpu"
        and config.model_type in _BRANCHING_TYPES
        and config._attn_implementation in ("sdpa", "eager")
        and not sliding
        and not windowed
    )
