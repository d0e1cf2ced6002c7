"""Reading prompts that share their beginnings, on a CPU: every shared part is run once.

The beginning that all rows share is kept once for the whole batch, and attention reads it from there
(`_branched_attention`). What only some share, such as the question among its subproblems, is run once for those
and copied into their caches. Each row's own cache is written in place instead of being concatenated anew for
every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Tokens of one forward pass over prompts: full speed on a CPU needs about a hundred, and the more there are in a
# pass, the more of them are padding.
PIECE_TOKENS = 256
# Sharing that saves fewer tokens than this costs more in bookkeeping.
MIN_SAVED = 16


def run(
    model: Any,
    tokens: torch.Tensor,
    past: DynamicCache,
    attention_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run tokens (B, Q) on top of a cache, which grows by them; returns the last position's logits (B, V)."""
    return model(
        input_ids=tokens,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as one left-padded tensor, and which of it is real: both (B, S)."""
    width = max(map(len, rows))
    tokens = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    real = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(real, device=device)


def shared_heads(rows: Sequence[Sequence[int]]) -> list[int]:
    """How many leading tokens each row should share with a group of others, so that most are saved in all.

    Rows in lexicographic order make a tree of common prefixes; of every branch either the whole becomes one
    group, or its parts do, whichever saves more. At least one token of each row is left over. 0: no group.
    """
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    common = [0] + [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    shortest = [len(rows[index]) - 1 for index in order]

    def best(low: int, high: int, depth: int) -> tuple[int, list[tuple[int, int, int]]]:
        """(tokens saved, groups as (low, high, head)) of the rows order[low:high]."""
        if high - low == 1:
            return 0, []
        least = min(common[low + 1 : high])
        head = min(least, *shortest[low:high])
        saved = (high - low - 1) * head
        whole = [(low, high, head)] if saved >= MIN_SAVED else []
        if depth == 0:
            return saved, whole
        cuts = [low, *(at for at in range(low + 1, high) if common[at] == least), high]
        parts = [best(a, b, depth - 1) for a, b in pairwise(cuts)]
        apart = sum(part for part, _ in parts)
        return (saved, whole) if saved >= apart else (apart, [group for _, groups in parts for group in groups])

    heads = [0] * len(rows)
    for low, high, head in best(0, len(rows), 50)[1]:
        for at in range(low, high):
            heads[order[at]] = head
    return heads


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning of two token lists."""
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))


def _pieces(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar length, of about `PIECE_TOKENS` each."""
    piece: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        piece.append(index)
        if len(piece) * lengths[index] >= PIECE_TOKENS:
            yield piece
            piece = []
    if piece:
        yield piece


_Part = tuple[torch.Tensor, torch.Tensor]  # keys and values of one row in one layer, each (Hkv, S, D)


class _Layer(DynamicLayer):
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

    def preload(self, parts: Sequence[_Part | None]) -> None:
        """Begin each row with given keys and values, (Hkv, G, D) of any G each or none, aligned at their ends."""
        found = next(part for part in parts if part is not None)
        width = max(part[0].shape[1] for part in parts if part is not None)
        heads, _, size = found[0].shape
        self.lazy_initialization(found[0], found[1])
        self.keys = found[0].new_empty(len(parts), heads, self.room, size)
        self.values = found[1].new_empty(len(parts), heads, self.room, size)
        for row, part in enumerate(parts):
            start = width - (0 if part is None else part[0].shape[1])
            # Masked, but not to be left as it is: what memory held before may be NaN, and 0 × NaN is NaN.
            self.keys[row, :, :start], self.values[row, :, :start] = 0, 0
            if part is not None:
                self.keys[row, :, start:width], self.values[row, :, start:width] = part
        self.used = width

    def real(self, row: int, seen: torch.Tensor) -> _Part:
        """The keys and values of one row that are no padding; `seen` (S,) says which."""
        assert self.keys is not None and self.values is not None
        keys, values = self.keys[row, :, : self.used], self.values[row, :, : self.used]
        return keys[:, seen], values[:, seen]

    def get_seq_length(self) -> int:
        """Tokens before the next one."""
        return self.shared + self.used


def _layers(cache: DynamicCache) -> list[_Layer]:
    """The layers of one of our caches, by their true type."""
    return cast("list[_Layer]", cache.layers)


class Branched:
    """Caches that branch: see the module. Use it as a context, inside which the model's attention is ours.

    Args:
        model: one that `can_branch`.
        prefix: the cache of what all rows share, of `shared` tokens (0: none).
        pad_id: fills the left of shorter rows.
    """

    def __init__(self, model: Any, prefix: DynamicCache, shared: int, pad_id: int) -> None:
        self._model, self._config, self._pad_id = model, model.config, pad_id
        self._shared, self._dtype = shared, next(model.parameters()).dtype
        layers: list[Any] = list(prefix.layers)
        nothing = [(None, None)] * model.config.num_hidden_layers
        self._prefix = [(layer.keys, layer.values) for layer in layers] if shared else nothing
        self.past = self._cache(0)

    def __enter__(self) -> Branched:
        self._before = self._config._attn_implementation
        self._config._attn_implementation = _NAME
        return self

    def __exit__(self, *_: object) -> None:
        self._config._attn_implementation = self._before

    def read(self, rows: Sequence[list[int]], room: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run what follows the prefix in every prompt, leaving room for as many more tokens.

        Returns:
            The next token's logits (B, V), which cached tokens are real (B, S), each row's last position (B, 1).
        """
        heads = [tuple(row[:length]) for row, length in zip(rows, shared_heads(rows), strict=True)]
        distinct = list(dict.fromkeys(head for head in heads if head))
        found, _ = self._read(distinct, [None] * len(distinct))
        by_head: dict[tuple[int, ...], list[_Part] | None] = {(): None, **dict(zip(distinct, found, strict=True))}
        tails = [row[len(head) :] for row, head in zip(rows, heads, strict=True)]
        parts, logits = self._read(tails, [by_head[head] for head in heads])
        width = max(map(len, rows))
        self.past = self._cache(width + room)
        for number, layer in enumerate(_layers(self.past)):
            layer.preload([row[number] for row in parts])
        _, mask = padded(rows, self._pad_id, logits[0].device)
        last = torch.tensor([[self._shared + len(row) - 1] for row in rows], device=mask.device)
        return torch.stack(logits), mask, last

    def run(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The next tokens (B, Q) of every row; returns logits (B, V). The mask (B, S) says what is real."""
        return self._run(self.past, tokens, mask, positions)

    def _read(
        self, rows: Sequence[Sequence[int]], before: Sequence[list[_Part] | None]
    ) -> tuple[list[list[_Part]], list[torch.Tensor]]:
        """Run token lists, each after what was cached before it (or nothing but the prefix), in pieces.

        Returns:
            For every row, a part a layer: what was before and what was read; and its logits (V,).
        """
        parts: list[list[_Part]] = [[] for _ in rows]
        logits: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for piece in _pieces([len(row) for row in rows]):
            tokens, real = padded([rows[index] for index in piece], self._pad_id, torch.device("cpu"))
            given = [before[index] for index in piece]
            lengths = torch.tensor([0 if known is None else known[0][0].shape[1] for known in given])
            width = int(lengths.max())
            cache = self._cache(width + tokens.shape[1])
            if width:
                for number, layer in enumerate(_layers(cache)):
                    layer.preload([None if known is None else known[number] for known in given])
            mask = torch.cat([(torch.arange(width) >= width - lengths[:, None]).to(real.dtype), real], dim=1)
            positions = (real.cumsum(dim=1) - 1).clamp(min=0) + lengths[:, None] + self._shared
            found = self._run(cache, tokens, mask, positions)
            for row, index in enumerate(piece):
                seen = mask[row].bool()  # both blocks are aligned at their ends: padding may lie between them
                parts[index] = [layer.real(row, seen) for layer in _layers(cache)]
                logits[index] = found[row]
        return parts, logits

    def _run(
        self, cache: DynamicCache, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Run tokens (B, Q) on top of one of these caches; the mask (B, S) is of everything after the prefix."""
        queries, total = tokens.shape[1], mask.shape[1]
        causal = torch.ones(queries, total, dtype=torch.bool).tril(total - queries)
        seen = causal & mask.bool()[:, None, None, :]  # (B, 1, Q, S)
        lowest = torch.finfo(self._dtype).min
        bias = torch.zeros(seen.shape, dtype=self._dtype).masked_fill(~seen, lowest)  # added to the scores
        token = _active.set(cache)
        try:
            return run(self._model, tokens, cache, bias, positions)
        finally:
            _active.reset(token)

    def _cache(self, room: int) -> DynamicCache:
        """An empty cache on top of the prefix, with room for so many tokens a row."""
        cache = DynamicCache(config=self._config)
        cache.layers = [_Layer(keys, values, self._shared, room) for keys, values in self._prefix]
        return cache


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
    prefix_key, prefix_value = _layers(_active.get())[module.layer_idx].prefix
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


def can_branch(model: Any) -> bool:
    """Whether this model's attention can go through `_branched_attention`, here."""
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
