"""Reading prompts that share their beginnings, on a CPU: every shared part is run once.

The beginning that all rows share is kept once for the whole batch, and attention reads it from there
(`_branched_attention`). What only some share, such as the question among its subproblems, is run once for those
and copied into their caches. Each row's own cache is written in place instead of being concatenated anew for
every token.
"""

from __future__ import annotations

import math
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
# Attention over another block of rows costs about as much as it does over this many padding tokens.
MIN_UNPADDED = 1000


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


def block_ends(lengths: Sequence[int]) -> list[int]:
    """Where to cut rows of these lengths into runs that are padded apart, so that little is padding: ascending ends.

    A run is cut where that saves most, as long as it saves enough. Rows in order of their length need fewest cuts.
    """
    widest, best, cut = max(lengths), 0, 0
    for at in range(1, len(lengths)):
        left, right = max(lengths[:at]), max(lengths[at:])
        saved = at * (widest - left) + (len(lengths) - at) * (widest - right)
        if saved > best:
            best, cut = saved, at
    if best < MIN_UNPADDED:
        return [len(lengths)]
    return [*block_ends(lengths[:cut]), *(cut + end for end in block_ends(lengths[cut:]))]


_Part = tuple[torch.Tensor, torch.Tensor]  # keys and values of one row in one layer, each (Hkv, S, D)


class _Block:
    """Keys and values of some rows, aligned at their ends, with room for more: written in place, not concatenated."""

    def __init__(self, like: torch.Tensor, rows: int, room: int) -> None:
        """`like`: any tensor (…, Hkv, S, D) of the right dtype."""
        heads, _, size = like.shape[-3:]
        self.keys = like.new_empty(rows, heads, room, size)
        self.values = like.new_empty(rows, heads, room, size)
        self.used = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add (rows, Hkv, Q, D) to each."""
        end = self.used + keys.shape[2]
        self.keys[:, :, self.used : end], self.values[:, :, self.used : end] = keys, values
        self.used = end

    def preload(self, parts: Sequence[_Part | None], width: int) -> None:
        """Begin each row with given keys and values of at most this width, or with none."""
        for row, part in enumerate(parts):
            start = width - (0 if part is None else part[0].shape[1])
            # Masked, but not to be left as it is: what memory held before may be NaN, and 0 × NaN is NaN.
            self.keys[row, :, :start], self.values[row, :, :start] = 0, 0
            if part is not None:
                self.keys[row, :, start:width], self.values[row, :, start:width] = part
        self.used = width


class _Layer(DynamicLayer):
    """A layer's cache: one prefix for all rows, and each row's own tokens in blocks of rows of similar length."""

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None, shared: int, room: int) -> None:
        super().__init__()
        self.prefix = (keys, values)  # each (1, Hkv, P, D), or None
        self.shared = shared
        self.room = room
        self.blocks: list[_Block] = []  # of consecutive rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, Hkv, Q, D). Returns them as they came: our attention reads the blocks."""
        if not self.blocks:
            self.blocks = [_Block(key_states, len(key_states), self.room)]
        start = 0
        for block in self.blocks:
            end = start + len(block.keys)
            block.append(key_states[start:end], value_states[start:end])
            start = end
        return key_states, value_states

    def preload(self, parts: Sequence[_Part | None], ends: Sequence[int]) -> None:
        """Begin each row with given keys and values, (Hkv, G, D) of any G each or none; a block up to each end."""
        lengths = [0 if part is None else part[0].shape[1] for part in parts]
        like = next(part[0] for part in parts if part is not None)
        for start, end in pairwise([0, *ends]):
            width = max(lengths[start:end])
            block = _Block(like, end - start, self.room - max(lengths) + width)
            block.preload(parts[start:end], width)
            self.blocks.append(block)

    def real(self, row: int, seen: torch.Tensor) -> _Part:
        """The keys and values of one row that are no padding; `seen` (S,) says which. For a single block."""
        (block,) = self.blocks
        return block.keys[row, :, : block.used][:, seen], block.values[row, :, : block.used][:, seen]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only, in ascending order."""
        start, kept = 0, []
        for block in self.blocks:
            end = start + len(block.keys)
            mine = indices[(indices >= start) & (indices < end)] - start
            if 0 < len(mine) < len(block.keys):
                block.keys, block.values = block.keys[mine], block.values[mine]
            if len(mine):
                kept.append(block)
            start = end
        self.blocks = kept

    def get_seq_length(self) -> int:
        """Tokens before the next one."""
        return self.shared + max((block.used for block in self.blocks), default=0)


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
        lengths = [len(row) for row in rows]
        self.past, ends = self._cache(max(lengths) + room), block_ends(lengths)
        for number, layer in enumerate(_layers(self.past)):
            layer.preload([row[number] for row in parts], ends)
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
                    layer.preload([None if known is None else known[number] for known in given], [len(piece)])
            mask = torch.cat([(torch.arange(width) >= width - lengths[:, None]).to(real.dtype), real], dim=1)
            positions = (real.cumsum(dim=1) - 1).clamp(min=0) + lengths[:, None] + self._shared
            # Of a long piece, what comes first need not be compared with what comes after it.
            step = math.ceil(tokens.shape[1] / max(1, round(tokens.numel() / PIECE_TOKENS)))
            for start in range(0, tokens.shape[1], step):
                now = slice(start, start + step)
                found = self._run(cache, tokens[:, now], mask[:, : width + start + step], positions[:, now])
            for row, index in enumerate(piece):
                seen = mask[row].bool()  # what was before and what was read end apart: padding may lie between them
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
        query: (B, Hq, Q, D). key, value: the newest ones, which the cache's blocks hold already.
        attention_mask: added to the scores of each row's own keys, (B, 1, Q, S).

    Returns:
        (B, Q, Hq, D) and None.
    """
    layer = _layers(_active.get())[module.layer_idx]
    found, start = [], 0
    for block in layer.blocks:
        end = start + len(block.keys)
        bias = attention_mask[start:end, ..., -block.used :]
        found.append(_attend(query[start:end] * scaling, block, layer.prefix, bias))
        start = end
    return found[0] if len(found) == 1 else torch.cat(found), None


def _attend(
    query: torch.Tensor, block: _Block, prefix: tuple[torch.Tensor | None, torch.Tensor | None], bias: torch.Tensor
) -> torch.Tensor:
    """Attention of a block's rows: scaled queries (B, Hq, Q, D), bias (B, 1, Q, S); returns (B, Q, Hq, D)."""
    key, value = block.keys[:, :, : block.used], block.values[:, :, : block.used]  # (B, Hkv, S, D)
    batch, query_heads, queries, size = query.shape
    heads = key.shape[1]
    together = (query_heads // heads) * queries
    grouped = query.reshape(batch, heads, together, size)  # (B, Hkv, GQ, D)
    own = grouped @ key.transpose(2, 3)  # (B, Hkv, GQ, S)
    own.view(batch, heads, -1, queries, block.used).add_(bias.unsqueeze(2))
    prefix_key, prefix_value = prefix
    if prefix_key is None or prefix_value is None:
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
    return mixed.reshape(batch, query_heads, queries, size).transpose(1, 2).contiguous()


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
