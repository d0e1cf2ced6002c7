"""Reading and continuing many prompts at once on a CPU: nothing that they share is run twice, and nothing is padded.

The tokens of a pass stand in one line, prompt after prompt, so that the matrix products meet no padding; only
attention tells the prompts apart (`_branched_attention`). What all prompts of a kind begin with, such as few-shot
turns, is kept once, and attention reads it from there. What only some share, such as the question among its
subproblems, is run once for those and copied. Every prompt's own keys and values are written in place instead of
being concatenated anew for every token, and the newest can be forgotten again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from transformers import AttentionInterface

from common.decoding.blocks import Block, Heads, Part, tokens_in
from common.decoding.sharing import (
    MIN_KEPT_APART,
    MIN_SHARED_PREFIX,
    PIECE_TOKENS,
    block_ends,
    matching,
    pieces,
    shared_heads,
    shared_prefix_length,
)

# Queries of one product of attention: of a long piece, what comes first is not compared with what comes after it.
PIECE_QUERIES = 128

# What prompts of each kind have begun with so far: tokens, and a part a layer.
Prefixes = dict[Hashable, tuple[list[int], list[Part]]]


class _Pass:
    """The tokens of a block's rows in one forward pass: where they stand, and what each of them sees."""

    def __init__(self, block: Block, counts: Sequence[int], start: int, dtype: torch.dtype) -> None:
        """`counts`: of each row's tokens, which begin at `start` in the line of all tokens of the pass."""
        lengths = block.lengths
        self._block, self._counts = block, counts
        self._here = slice(start, start + sum(counts))
        self._queries = most = max(counts)
        self._end = max(length + count for length, count in zip(lengths, counts, strict=True))
        places = [length + turn for length, count in zip(lengths, counts, strict=True) for turn in range(count)]
        heads = block.heads.lengths if block.heads is not None else [0] * len(counts)
        start_at = [block.shared + head for head, count in zip(heads, counts, strict=True) for _ in range(count)]
        self.positions = [first + place for first, place in zip(start_at, places, strict=True)]
        even = min(counts) == most
        aligned = even and min(lengths) == max(lengths)
        self._place: tuple[torch.Tensor, torch.Tensor] | None = None  # of each token: its row, and where in it
        if not aligned:
            rows = [row for row, count in enumerate(counts) for _ in range(count)]
            self._place = (torch.tensor(rows), torch.tensor(places))
        self._spread: torch.Tensor | None = None  # (R · Q,) → token, where rows have unlike numbers of them
        self._gather: torch.Tensor | None = None  # token → (R · Q,)
        if not even:
            starts = [0, *accumulate(counts)]
            last = starts[-1] - 1
            self._spread = torch.tensor([min(at + turn, last) for at in starts[:-1] for turn in range(most)])
            self._gather = torch.tensor(
                [row * most + turn for row, count in enumerate(counts) for turn in range(count)]
            )
        self._wiped = None if aligned and lengths[0] == block.clean else slice(block.clean, self._end)
        self._bias: torch.Tensor | None = None  # added to the scores, (R, 1, Q, S)
        if not aligned or most > 1:
            newest = torch.tensor(lengths)[:, None] + torch.arange(most)  # (R, Q): the last key that each sees
            hidden = torch.arange(self._end) > newest[:, None, :, None]
            self._bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)

    def done(self) -> None:
        """All layers have seen these tokens."""
        block = self._block
        block.lengths = [length + count for length, count in zip(block.lengths, self._counts, strict=True)]
        block.clean = max(block.clean, self._end)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of this block's tokens in one layer.

        Args:
            query: scaled, of all tokens of the pass, (Hq, T, D). key, value: theirs, (Hkv, T, D).

        Returns:
            (N, Hq, D) of the block's N tokens.
        """
        query, key, value = (states[:, self._here] for states in (query, key, value))
        keys, values = self._block.layer(layer, key)
        self._write(keys, key)
        self._write(values, value)
        if self._spread is not None:
            query = query[:, self._spread]
        rows, size = len(keys), key.shape[-1]
        grouped = query.reshape(len(key), -1, rows, self._queries, size).permute(2, 0, 1, 3, 4)  # (R, Hkv, G, Q, D)
        prefix = self._block.prefix[layer] if self._block.prefix else None
        heads = None if self._block.heads is None else (self._block.heads, layer)
        found, first = [], max(self._block.lengths)
        for start in range(0, self._queries, PIECE_QUERIES):
            now = slice(start, start + PIECE_QUERIES)
            end = min(self._end, first + now.stop)
            bias = None if self._bias is None else self._bias[:, :, now, :end]
            found.append(_attend(grouped[..., now, :], keys[:, :, :end], values[:, :, :end], prefix, heads, bias))
        mixed = (found[0] if len(found) == 1 else torch.cat(found, dim=1)).flatten(0, 1)  # (R · Q, Hq, D)
        return mixed if self._gather is None else mixed[self._gather]

    def _write(self, store: torch.Tensor, states: torch.Tensor) -> None:
        """Put the tokens' keys or values (Hkv, N, D) where they belong in (R, Hkv, room, D)."""
        if self._wiped is not None:
            store[:, :, self._wiped] = 0
        if self._place is None:
            rows, heads, _, size = store.shape
            new = states.reshape(heads, rows, self._queries, size).transpose(0, 1)
            store[:, :, self._end - self._queries : self._end] = new
        else:
            row, place = self._place
            store[row, :, place] = states.transpose(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: Part | None,
    shared_by_some: tuple[Heads, int] | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over a prefix that all rows share, over what some of them share, and over each row's own keys.

    The queries of all rows meet the prefix in one matrix product per key-value head, so that it is read once and
    not once a row; query heads that share a key-value head (GQA) share the product too, instead of repeating keys
    and values for them.

    Args:
        query: (R, Hkv, G, Q, D), scaled. key, value: (R, Hkv, S, D). bias: (R, 1, Q, S).
        shared_by_some: the rows' heads, and the layer.

    Returns:
        (R, Q, Hkv · G, D).
    """
    rows, heads, group, queries, size = query.shape
    together = group * queries
    grouped = query.reshape(rows, heads, together, size)
    scores = grouped @ key.transpose(2, 3)  # (R, Hkv, GQ, S)
    if bias is not None:
        scores.view(rows, heads, group, queries, -1).add_(bias.unsqueeze(1))
    parts = [scores]
    if shared_by_some is not None:
        of_some, layer = shared_by_some
        parts.insert(0, of_some.scores(layer, grouped))
    if prefix is not None:
        prefix_key, prefix_value = prefix  # each (Hkv, P, D)
        flat = grouped.transpose(0, 1).reshape(heads, rows * together, size)
        shared = (flat @ prefix_key.transpose(1, 2)).view(heads, rows, together, -1).transpose(0, 1)
        parts.insert(0, shared)
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    odds = torch.softmax(joined, dim=-1, dtype=torch.float32).to(query.dtype)
    *before, own = odds.split([part.shape[-1] for part in parts], dim=-1)
    mixed = own @ value
    if shared_by_some is not None:
        mixed += of_some.mixed(layer, before.pop())
    if prefix is not None:
        shared_odds = before.pop().transpose(0, 1).reshape(heads, rows * together, -1)
        mixed += (shared_odds @ prefix_value).view(heads, rows, together, size).transpose(0, 1)
    return mixed.view(rows, heads * group, queries, size).transpose(1, 2)


class Branched:
    """Caches that branch: see the module. Use it as a context, inside which the model's attention is ours.

    Args:
        model: one that `can_branch`.
        prefixes: what prompts began with is looked up here, and left here for the next time; None for a model whose
            weights change in between.
    """

    def __init__(self, model: Any, prefixes: Prefixes | None = None) -> None:
        self._model = model
        self._prefixes: Prefixes = {} if prefixes is None else prefixes
        self._dtype = next(model.parameters()).dtype
        self._blocks: list[Block] = []  # of consecutive rows

    def __enter__(self) -> Branched:
        self._before = _attention_of(self._model)
        self._model.set_attn_implementation(_NAME)
        return self

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(self._before)

    def read(self, prompts: Sequence[list[int]], kinds: Sequence[Hashable], room: int) -> torch.Tensor:
        """Run all prompts, those of a kind next to each other; afterwards each has room for so many more tokens.

        Returns:
            The next token's logits (B, V).
        """
        logits: list[torch.Tensor] = []
        for kind, group in groupby(zip(kinds, prompts, strict=True), key=lambda pair: pair[0]):
            rows = [row for _, row in group]
            prefix = self._prefix(kind, rows)
            shared = tokens_in(prefix)
            parts, found, heads = self._read_shared(prefix, [row[shared:] for row in rows])
            logits += found
            lengths = [tokens_in(part) for part in parts]
            for start, end in pairwise([0, *block_ends(lengths)]):
                mine = None if heads is None else heads.select(range(start, end))
                self._blocks.append(Block(prefix, parts[start:end], max(lengths[start:end]) + room, mine))
        return torch.stack(logits)

    def run(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run some more tokens of every row, or none; returns the logits after each of them, (T, V)."""
        return self._run(self._blocks, tokens, 0)

    def forget(self, counts: Sequence[int]) -> None:
        """Take back the newest tokens of every row, so many."""
        for block, mine in self._by_block(counts):
            block.lengths = [length - count for length, count in zip(block.lengths, mine, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in ascending order."""
        total = sum(len(block.lengths) for block in self._blocks)
        chosen = set(rows)
        for block, mine in self._by_block(range(total)):
            block.select([place for place, row in enumerate(mine) if row in chosen])
        self._blocks = [block for block in self._blocks if block.lengths]

    def _by_block(self, of_rows: Sequence[Any]) -> Iterator[tuple[Block, Sequence[Any]]]:
        """Every block with its rows' share of a sequence."""
        start = 0
        for block in self._blocks:
            end = start + len(block.lengths)
            yield block, of_rows[start:end]
            start = end

    def _prefix(self, kind: Hashable, rows: Sequence[list[int]]) -> list[Part]:
        """Keys and values of what rows of a kind begin with: as much as they share, or as is known of it already."""
        known, parts = self._prefixes.get(kind, ([], []))
        several = len(rows) > 1
        wanted = rows[0][: shared_prefix_length(rows) if several else len(rows[0]) - 1]
        both = matching(known, wanted)
        if not several:
            wanted = wanted[:both]
        if len(wanted) < MIN_SHARED_PREFIX:
            return []
        if both < len(known):
            parts = [(keys[:, :both].clone(), values[:, :both].clone()) for keys, values in parts]
        found = parts
        if both < len(wanted):
            ((new,), _) = self._read(parts, [wanted[both:]], [[]], None)
            found = [
                (torch.cat([keys, more], dim=1), torch.cat([values, others], dim=1))
                for (keys, values), (more, others) in zip(parts, new, strict=True)
            ] if both else new  # fmt: skip
        # Kept is what all prompts of the kind so far have in common, so that it settles on the fixed text.
        self._prefixes[kind] = (wanted[:both], parts) if both >= MIN_SHARED_PREFIX else (wanted, found)
        return found

    def _read_shared(
        self, prefix: list[Part], rows: Sequence[list[int]]
    ) -> tuple[list[list[Part]], list[torch.Tensor], Heads | None]:
        """`_read` after the prefix, where what only some rows share is run once; and that, where it is kept apart."""
        heads = [tuple(row[:length]) for row, length in zip(rows, shared_heads(rows), strict=True)]
        distinct = list(dict.fromkeys(head for head in heads if head))
        found, _ = self._read(prefix, distinct, [[]] * len(distinct), None)
        tails = [row[len(head) :] for row, head in zip(rows, heads, strict=True)]
        if sum(map(len, heads)) - sum(map(len, distinct)) < MIN_KEPT_APART:
            by_head: dict[tuple[int, ...], list[Part]] = {(): [], **dict(zip(distinct, found, strict=True))}
            return *self._read(prefix, tails, [by_head[head] for head in heads], None), None
        if not all(heads):
            distinct, found = [*distinct, ()], [*found, []]
        apart = Heads.padded(found, [distinct.index(head) for head in heads])
        return *self._read(prefix, tails, [[]] * len(rows), apart), apart

    def _read(
        self,
        prefix: list[Part],
        rows: Sequence[Sequence[int]],
        before: Sequence[list[Part]],
        heads: Heads | None,
    ) -> tuple[list[list[Part]], list[torch.Tensor]]:
        """Run token lists, each after the prefix, its head and what else was cached before it, in pieces.

        Returns:
            For every row, a part a layer: what was before and what was read; and its logits (V,).
        """
        parts: list[list[Part]] = [[] for _ in rows]
        logits: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for piece in pieces([len(row) for row in rows]):
            longest = max(len(rows[index]) for index in piece)
            given = [before[index] for index in piece]
            room = longest + max(map(tokens_in, given))
            block = Block(prefix, given, room, None if heads is None else heads.select(piece))
            step = math.ceil(longest / max(1, round(sum(len(rows[index]) for index in piece) / PIECE_TOKENS)))
            for start in range(0, longest, step):
                now = [rows[index][start : start + step] for index in piece]
                ends = torch.tensor([len(tokens) for tokens in now]).cumsum(0) - 1
                ending = [row for row, index in enumerate(piece) if start < len(rows[index]) <= start + step]
                found = self._run([block], now, ends[ending] if ending else 1)
                for row, place in zip(ending, found, strict=False):
                    logits[piece[row]] = place
            for row, index in enumerate(piece):
                parts[index] = block.row(row)
        return parts, logits

    def _run(
        self, blocks: Sequence[Block], tokens: Sequence[Sequence[int]], wanted: int | torch.Tensor
    ) -> torch.Tensor:
        """Run tokens on top of these blocks; returns logits (T, V), or those wanted in transformers' terms."""
        passes: list[_Pass] = []
        row = start = 0
        for block in blocks:
            counts = [len(new) for new in tokens[row : row + len(block.lengths)]]
            row += len(counts)
            if any(counts):
                passes.append(_Pass(block, counts, start, self._dtype))
                start += sum(counts)
        active = _active.set(passes)
        try:
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([[token for new in tokens for token in new]]),
                position_ids=torch.tensor([[place for one in passes for place in one.positions]]),
                use_cache=False,
                logits_to_keep=wanted,
            ).logits
        finally:
            _active.reset(active)
        for one in passes:
            one.done()
        return logits[0]


_NAME = "branched"
_active: ContextVar[list[_Pass]] = ContextVar("the blocks' tokens in the forward pass that is running")


def _branched_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scaling: float, **__: Any
) -> tuple[torch.Tensor, None]:
    """Attention of one line of tokens, (1, Hq, T, D) and (1, Hkv, T, D), block by block; returns (1, T, Hq, D)."""
    scaled = query[0] * scaling
    found = [one.attend(module.layer_idx, scaled, key[0], value[0]) for one in _active.get()]
    return (found[0] if len(found) == 1 else torch.cat(found)).unsqueeze(0), None


AttentionInterface.register(_NAME, _branched_attention)


def _attention_of(model: Any) -> str:
    """Name of the attention in use. transformers has a public setter for it, but only a private name to read it by."""
    return str(model.config._attn_implementation)


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
        and _attention_of(model) in ("sdpa", "eager")
        and not sliding
        and not windowed
    )
