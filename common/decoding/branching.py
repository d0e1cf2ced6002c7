"""Prefill and decoding of many prompts at once on a CPU, without padding and without repeating shared tokens.

The tokens of all prompts form one sequence (the "line" below), one prompt after the other, with batch size 1. So matrix
products process no padding. Only attention separates the prompts; `_branched_attention` replaces the model's own.

- The beginning that all prompts of a kind share (for example few-shot turns) is run once and stored once.
- A beginning that only some prompts share (for example one question with its subproblems) is run once for them.
  It is then copied to each of them, or stored once where that saves enough.
- A prompt's own keys and values are written into memory reserved beforehand, not concatenated for every token. The
  newest can be removed again (`Branched.forget`), as speculative decoding needs.

Letters in shapes: B prompts, R rows of one block, Hq query heads, Hkv key-value heads, G query heads per key-value
head, Q queries per row, T tokens of the pass, S cached tokens, P prefix tokens, D size of an attention head,
V vocabulary. `common.decoding.blocks` explains prefix and head.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from transformers import AttentionInterface

from common.decoding.blocks import Block, Heads, Kept, Part, attend, tokens_in
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

# Queries per attention product. A long prompt is cut here, so that its early queries skip the keys of later tokens.
PIECE_QUERIES = 128

# For each kind of prompt, the shared beginning seen so far: its token ids, and its keys and values (a part per layer).
Prefixes = dict[Hashable, tuple[list[int], list[Part]]]


class _Pass:
    """The new tokens of one block's rows in one forward pass: where they are stored, and which keys each may see.

    Args:
        block: the rows' cache.
        counts: number of new tokens of each row (R).
        start: index of the block's first token in the line of all tokens of the pass.
        dtype: of the attention scores.
    """

    def __init__(self, block: Block, counts: Sequence[int], start: int, dtype: torch.dtype) -> None:
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
        self._place: tuple[torch.Tensor, torch.Tensor] | None = None  # for each token: its row, and its index there
        if not aligned:
            rows = [row for row, count in enumerate(counts) for _ in range(count)]
            self._place = (torch.tensor(rows), torch.tensor(places))
        self._spread: torch.Tensor | None = None  # (R · Q,) → token; only if rows have unequal numbers of tokens
        self._gather: torch.Tensor | None = None  # token → (R · Q,); the reverse
        if not even:
            starts = [0, *accumulate(counts)]
            last = starts[-1] - 1
            self._spread = torch.tensor([min(at + turn, last) for at in starts[:-1] for turn in range(most)])
            self._gather = torch.tensor(
                [row * most + turn for row, count in enumerate(counts) for turn in range(count)]
            )
        # Columns to set to 0 before writing: memory that was never written may hold NaN, and 0 · NaN is not 0.
        self._wiped = None if aligned and lengths[0] == block.clean else slice(block.clean, self._end)
        self._bias: torch.Tensor | None = None  # causal mask, added to the attention scores, (R, 1, Q, S)
        if not aligned or most > 1:
            newest = torch.tensor(lengths)[:, None] + torch.arange(most)  # (R, Q): last key that each query may see
            hidden = torch.arange(self._end) > newest[:, None, :, None]
            self._bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)

    def done(self) -> None:
        """Count the tokens as cached. Call it after all layers have run."""
        block = self._block
        block.lengths = [length + count for length, count in zip(block.lengths, self._counts, strict=True)]
        block.clean = max(block.clean, self._end)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention output of this block's tokens in one layer; their keys and values are cached.

        Args:
            layer: index of the layer.
            query, key, value: of all tokens of the pass: (Hq, T, D), already scaled, and twice (Hkv, T, D).

        Returns:
            (N, Hq, D) for the N tokens of this block.
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
            found.append(attend(grouped[..., now, :], keys[:, :, :end], values[:, :, :end], prefix, heads, bias))
        mixed = (found[0] if len(found) == 1 else torch.cat(found, dim=1)).flatten(0, 1)  # (R · Q, Hq, D)
        return mixed if self._gather is None else mixed[self._gather]

    def keep(self, layer: int, states: torch.Tensor) -> None:
        """Store states (1, T, H) of the pass's tokens as if they were the keys and values of one more layer."""
        halves = states[:, self._here].chunk(2, dim=-1)
        for store, half in zip(self._block.layer(layer, halves[0]), halves, strict=True):
            self._write(store, half)

    def _write(self, store: torch.Tensor, states: torch.Tensor) -> None:
        """Store the tokens' keys or values (Hkv, N, D) at their rows and columns in (R, Hkv, room, D)."""
        if self._wiped is not None:
            store[:, :, self._wiped] = 0
        if self._place is None:
            rows, heads, _, size = store.shape
            new = states.reshape(heads, rows, self._queries, size).transpose(0, 1)
            store[:, :, self._end - self._queries : self._end] = new
        else:
            row, place = self._place
            store[row, :, place] = states.transpose(0, 1)


class Branched:
    """A KV cache for many prompts that share beginnings; the module's docstring explains it.

    Use it as a context manager: inside, the model runs with `_branched_attention`.

    Args:
        model: a causal LM for which `can_branch` holds.
        prefixes: shared beginnings of earlier calls, which this one reads and updates. None for a model whose weights
            change between calls: its cached keys and values would be outdated.
        kept: keeps the states that go into a layer, or None.
        places: for each row, its index in `kept`.
    """

    def __init__(
        self, model: Any, prefixes: Prefixes | None = None, kept: Kept | None = None, places: Sequence[int] = ()
    ) -> None:
        self._model = model
        self._kept, self._places = kept, list(places)
        self._prefixes: Prefixes = {} if prefixes is None else prefixes
        self._dtype = next(model.parameters()).dtype
        self._blocks: list[Block] = []  # each holds consecutive rows

    def __enter__(self) -> Branched:
        self._before = attention_of(self._model)
        self._model.set_attn_implementation(_NAME)
        if self._kept is not None:
            self._hook = self._kept.layer.register_forward_pre_hook(self._see)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._model.set_attn_implementation(self._before)
        if self._kept is not None:
            self._hook.remove()
            if error is None:
                self._keep(set())

    def _see(self, layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self._seen = given[0]  # (1, T, H)

    def _keep(self, left: set[int]) -> None:
        """Copy the states of all rows but those `left` out of the cache."""
        if self._kept is None:
            return
        for block, mine in self._by_block(range(len(self._places))):
            for place, row in enumerate(mine):
                if row not in left:
                    states = torch.cat(block.whole_row(place, self._model.config.num_hidden_layers), dim=-1)[0]
                    self._kept.states[self._places[row], : len(states)] = states
        self._places = [place for row, place in enumerate(self._places) if row in left]

    def read(self, prompts: Sequence[list[int]], kinds: Sequence[Hashable], room: int) -> torch.Tensor:
        """Prefill: run all prompts through the model, and reserve memory for their completions.

        Args:
            prompts: B lists of token ids.
            kinds: kind of each prompt (B); prompts of one kind stand next to each other.
            room: tokens that each prompt may grow by.

        Returns:
            Logits of each prompt's next token (B, V).
        """
        logits: list[torch.Tensor] = []
        for kind, rows in _by_kind(prompts, kinds):
            prefix = self._prefix(kind, rows)
            shared = tokens_in(prefix)
            parts, found, heads = self._read_shared(prefix, [row[shared:] for row in rows])
            logits += found
            lengths = [tokens_in(part) for part in parts]
            for start, end in pairwise([0, *block_ends(lengths)]):
                mine = None if heads is None else heads.select(range(start, end))
                self._blocks.append(Block(prefix, parts[start:end], max(lengths[start:end]) + room, mine))
        return torch.stack(logits)

    def keep_prefixes(self, prompts: Sequence[list[int]], kinds: Sequence[Hashable]) -> None:
        """Read only what all prompts of a kind share, as `read` does first, so that later calls find it."""
        for kind, rows in _by_kind(prompts, kinds):
            self._prefix(kind, rows)

    def run(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Decode: append each row's new tokens (maybe none). Returns the logits after each of them, (T, V)."""
        return self._run(self._blocks, tokens, 0)

    def forget(self, counts: Sequence[int]) -> None:
        """Remove the newest `counts[row]` tokens of every row from the cache."""
        for block, mine in self._by_block(counts):
            block.lengths = [length - count for length, count in zip(block.lengths, mine, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows; indices ascend."""
        total = sum(len(block.lengths) for block in self._blocks)
        chosen = set(rows)
        self._keep(chosen)
        for block, mine in self._by_block(range(total)):
            block.select([place for place, row in enumerate(mine) if row in chosen])
        self._blocks = [block for block in self._blocks if block.lengths]

    def _by_block(self, of_rows: Sequence[Any]) -> Iterator[tuple[Block, Sequence[Any]]]:
        """Each block, with the items of `of_rows` (one per row) that belong to its rows."""
        start = 0
        for block in self._blocks:
            end = start + len(block.lengths)
            yield block, of_rows[start:end]
            start = end

    def _prefix(self, kind: Hashable, rows: Sequence[list[int]]) -> list[Part]:
        """Keys and values of a kind's prefix: what its rows share; for a single row, what earlier rows began with."""
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
        # Keep only what all prompts of this kind so far share, so that the stored prefix becomes the fixed text.
        self._prefixes[kind] = (wanted[:both], parts) if both >= MIN_SHARED_PREFIX else (wanted, found)
        return found

    def _read_shared(
        self, prefix: list[Part], rows: Sequence[list[int]]
    ) -> tuple[list[list[Part]], list[torch.Tensor], Heads | None]:
        """As `_read`, but tokens that only some rows share are run once. Also returns the heads, if stored apart."""
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
        """Run token lists through the model in pieces; each list follows the prefix, its head and its cached tokens.

        Returns:
            For every row its keys and values (a part per layer; those from `before` included), and the logits after
            its last token (V,).
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
        """Run new tokens of these blocks. Returns logits (T, V); `wanted` is `logits_to_keep` of transformers."""
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
            if self._kept is not None:
                one.keep(self._model.config.num_hidden_layers, self._seen)
            one.done()
        return logits[0]


def _by_kind(prompts: Sequence[list[int]], kinds: Sequence[Hashable]) -> Iterator[tuple[Hashable, Sequence[list[int]]]]:
    """Each kind with its prompts, which stand next to each other."""
    for kind, group in groupby(zip(kinds, prompts, strict=True), key=lambda pair: pair[0]):
        yield kind, [prompt for _, prompt in group]


_NAME = "branched"
_active: ContextVar[list[_Pass]] = ContextVar("the blocks' tokens in the forward pass that is running")


def _branched_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scaling: float, **__: Any
) -> tuple[torch.Tensor, None]:
    """Attention in the form that transformers' `AttentionInterface` expects, block by block.

    The line of tokens has batch size 1: query (1, Hq, T, D), key and value (1, Hkv, T, D). Returns (1, T, Hq, D).
    """
    scaled = query[0] * scaling
    found = [one.attend(module.layer_idx, scaled, key[0], value[0]) for one in _active.get()]
    return (found[0] if len(found) == 1 else torch.cat(found)).unsqueeze(0), None


AttentionInterface.register(_NAME, _branched_attention)


def attention_of(model: Any) -> str:
    """Name of the model's attention implementation. transformers has a public setter for it, but no public getter."""
    return str(model.config._attn_implementation)


# Types with plain causal attention. Sliding windows and capped scores need other code, so such models do not branch.
_BRANCHING_TYPES = {"llama", "qwen2", "qwen3", "mistral"}


def can_branch(model: Any) -> bool:
    """Whether `Branched` works for this model: on a CPU, of a known type, with plain causal attention."""
    return next(model.parameters()).device.type == "cpu" and has_known_attention(model)


def has_known_attention(model: Any) -> bool:
    """Whether a model is of a known type, with plain causal attention. It may be without weights (meta device)."""
    config = model.config
    sliding = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (
        config.model_type in _BRANCHING_TYPES
        and attention_of(model) in ("sdpa", "eager")
        and not sliding
        and not windowed
    )
