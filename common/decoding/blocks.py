"""The KV cache of a batch of token rows, in three levels, so that shared tokens are stored only once.

A row is one sequence: a prompt and its completion. Its tokens are cached in up to three places:

- the prefix, which all rows of a block share (for example few-shot turns);
- a head, which only a group of rows shares (for example one question). `Heads` means these leading tokens here; it
  has nothing to do with attention heads;
- the row's own tokens.

Letters in shapes: R rows, N groups, M rows of the largest group, Hkv key-value heads of the model, T queries of a row,
S cached tokens, D size of one attention head.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

Part = tuple[torch.Tensor, torch.Tensor]  # keys and values of one layer, each (Hkv, S, D)


def tokens_in(parts: list[Part]) -> int:
    """Number of tokens in cached keys and values (a list with one part per layer); 0 for an empty list."""
    return parts[0][0].shape[1] if parts else 0


class Heads:
    """The heads of a block's rows: leading tokens that a group of rows shares, after the prefix. Each is stored once.

    Args:
        layers: per model layer, the keys and values of all N groups, each (N, Hkv, S, D), padded on the right.
        lengths: number of tokens of each group's head (N); 0 for a group without one.
        member: index of each row's group (R); every group has at least one row.
    """

    def __init__(self, layers: list[Part], lengths: Sequence[int], member: Sequence[int]) -> None:
        self._layers, self._of_groups, self._member = layers, lengths, member
        self.lengths = [lengths[group] for group in member]  # tokens of each row's head
        self._bias: torch.Tensor | None = None  # added to the attention scores to hide padding, (N, 1, 1, S)
        like = layers[0][0]
        if min(lengths) < like.shape[2]:
            padding = (torch.arange(like.shape[2]) >= torch.tensor(lengths)[:, None])[:, None, None]
            self._bias = like.new_zeros(padding.shape).masked_fill(padding, torch.finfo(like.dtype).min)
        # One matrix product serves all groups, so each must have M rows: a smaller group repeats rows of its own.
        # `_rows` gives the row for each of the N · M places, `_places` the place for each of the R rows.
        rows_of: list[list[int]] = [[] for _ in lengths]
        turns = []
        for row, group in enumerate(member):
            turns.append(len(rows_of[group]))
            rows_of[group].append(row)
        self._most = most = max(map(len, rows_of))
        self._rows = torch.tensor([row for rows in rows_of for row in (rows * most)[:most]])
        self._places = torch.tensor([group * most + turn for group, turn in zip(member, turns, strict=True)])

    @classmethod
    def padded(cls, parts: Sequence[list[Part]], member: Sequence[int]) -> Heads:
        """Build from unpadded heads.

        Args:
            parts: for each of N groups, one part per layer, or an empty list. At least one is not empty.
            member: index of each row's group (R).
        """
        lengths = [tokens_in(part) for part in parts]
        layers = []
        for number, (key, _) in enumerate(next(part for part in parts if part)):
            shape = (len(parts), key.shape[0], max(lengths), key.shape[2])
            keys, values = key.new_zeros(shape), key.new_zeros(shape)
            for group, (part, length) in enumerate(zip(parts, lengths, strict=True)):
                if part:
                    keys[group, :, :length], values[group, :, :length] = part[number]
            layers.append((keys, values))
        return cls(layers, lengths, member)

    def select(self, rows: Sequence[int]) -> Heads | None:
        """The heads of these rows only, in their order; None if none of these rows has a head."""
        member = [self._member[row] for row in rows]
        used = sorted(set(member))
        lengths = [self._of_groups[group] for group in used]
        if not any(lengths):
            return None
        layers = self._layers
        if len(used) < len(self._of_groups):
            kept = torch.tensor(used)
            layers = [(keys[kept], values[kept]) for keys, values in layers]
        return Heads(layers, lengths, [used.index(group) for group in member])

    def row(self, row: int) -> list[Part]:
        """Cached keys and values of one row's head, one part per layer. These are views, not copies."""
        group, length = self._member[row], self.lengths[row]
        return [(keys[group, :, :length], values[group, :, :length]) for keys, values in self._layers]

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention scores of queries against the heads' keys.

        Args:
            layer: index of the layer.
            query: of all rows, already scaled, (R, Hkv, T, D).

        Returns:
            (R, Hkv, T, S); padding has the smallest number of the dtype.
        """
        found = self._by_group(query) @ self._layers[layer][0].transpose(2, 3)
        return self._by_row(found if self._bias is None else found.add_(self._bias))

    def mixed(self, layer: int, odds: torch.Tensor) -> torch.Tensor:
        """Sum of the heads' values, weighted by attention probabilities.

        Args:
            layer: index of the layer.
            odds: the probabilities, (R, Hkv, T, S).

        Returns:
            (R, Hkv, T, D).
        """
        return self._by_row(self._by_group(odds) @ self._layers[layer][1])

    def _by_group(self, states: torch.Tensor) -> torch.Tensor:
        """(R, Hkv, T, X) → (N, Hkv, M · T, X): the rows of each group side by side."""
        _, heads, turns, size = states.shape
        found = states[self._rows].view(-1, self._most, heads, turns, size)
        return found.transpose(1, 2).reshape(-1, heads, self._most * turns, size)

    def _by_row(self, states: torch.Tensor) -> torch.Tensor:
        """(N, Hkv, M · T, X) → (R, Hkv, T, X): the reverse of `_by_group`."""
        groups, heads, _, size = states.shape
        found = states.view(groups, heads, self._most, -1, size).transpose(1, 2)
        return found.reshape(groups * self._most, heads, -1, size)[self._places]


class Block:
    """KV cache of R rows that begin with one prefix.

    The prefix is stored once. Each row's own tokens start at column 0 of its cache; the columns after them are free.

    Args:
        prefix: keys and values of the prefix, one part per layer; empty without a prefix.
        before: for each row, keys and values of own tokens that are already known: one part per layer, or [].
        room: tokens that each row's own cache can hold.
        heads: heads that groups of these rows share, or None.

    Attributes:
        shared: number of tokens of the prefix.
        lengths: number of own tokens of each row (R) that are cached.
    """

    def __init__(self, prefix: list[Part], before: Sequence[list[Part]], room: int, heads: Heads | None) -> None:
        self.prefix, self.room, self.heads = prefix, room, heads
        self.shared = tokens_in(prefix)
        self.lengths = [tokens_in(parts) for parts in before]
        self.clean = max(self.lengths)  # columns before this one are initialised in every row; later ones may be NaN
        self._layers: list[Part] = []  # each (R, Hkv, room, D)
        like = next((parts for parts in before if parts), [])
        for number, (key, _) in enumerate(like):
            for store, side in zip(self.layer(number, key), (0, 1), strict=True):
                for row, (parts, length) in enumerate(zip(before, self.lengths, strict=True)):
                    store[row, :, length : self.clean] = 0
                    if parts:
                        store[row, :, :length] = parts[number][side]

    def layer(self, number: int, like: torch.Tensor) -> Part:
        """Storage for the keys and values of layer `number`, each (R, Hkv, room, D); created at the first call.

        Args:
            number: index of the layer; layers are created in ascending order.
            like: tensor (Hkv, …, D) that gives sizes, dtype and device.
        """
        if number == len(self._layers):
            shape = (len(self.lengths), like.shape[0], self.room, like.shape[-1])
            self._layers.append((like.new_empty(shape), like.new_empty(shape)))
        return self._layers[number]

    def row(self, row: int) -> list[Part]:
        """Cached keys and values of one row's own tokens, one part per layer. These are views, not copies."""
        length = self.lengths[row]
        return [(keys[row, :, :length], values[row, :, :length]) for keys, values in self._layers]

    def whole_row(self, row: int, layer: int) -> Part:
        """What one layer holds of one row: prefix, head and own tokens, twice (Hkv, S, D)."""
        parts = [self.prefix, [] if self.heads is None else self.heads.row(row), self.row(row)]
        keys, values = zip(*(part[layer] for part in parts if part), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows (indices, in the order given) and free the others."""
        if len(rows) < len(self.lengths):
            kept = torch.tensor(rows, dtype=torch.long)
            self._layers = [(keys[kept], values[kept]) for keys, values in self._layers]
            self.lengths = [self.lengths[row] for row in rows]
            if self.heads is not None and rows:
                self.heads = self.heads.select(rows)


class Kept:
    """What goes into one layer of a model at the tokens of B rows, kept while the rows are generated.

    Args:
        layers: of the model.
        first: index of the layer.
        rows, width, size: B, the most tokens of a row (W), and the size of a state (H), an even number.

    Attributes:
        layer: the layer.
        states: (B, W, H) in fp32. A row's last token has none: it is chosen, but not run.
    """

    def __init__(self, layers: torch.nn.ModuleList, first: int, rows: int, width: int, size: int) -> None:
        self.layer, self.first = layers[first], first
        memory = mmap.mmap(-1, rows * width * size * 4)  # shared with copies of the process, which write to it
        self.states = torch.frombuffer(memory, dtype=torch.float32).view(rows, width, size)
        self._rows: dict[tuple[int, ...], int] = {}

    def name(self, rows: Sequence[Sequence[int]]) -> None:
        """Tell the ids of all tokens of the B rows, by which `find` knows them."""
        self._rows = {tuple(ids): row for row, ids in enumerate(rows)}

    def find(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """The states of rows (R, S) with a mask that is 1 for their tokens: (R, S, H); None if one was not kept."""
        rows = [self._rows.get(tuple(row[seen].tolist())) for row, seen in zip(ids, mask == 1, strict=True)]
        states = self.states.new_zeros(*ids.shape, self.states.shape[-1])
        for into, seen, row in zip(states, mask == 1, rows, strict=True):
            if row is None:
                return None
            into[seen] = self.states[row, : int(seen.sum())]
        return states


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: Part | None,
    shared_by_some: tuple[Heads, int] | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over three sets of keys: the prefix of all rows, the heads of groups of rows, and each row's own.

    One matrix product per key-value head compares the queries of all rows with the prefix. So the prefix is read once,
    not once per row. Query heads that share a key-value head (grouped-query attention, arXiv:2305.13245) share that
    product too; their keys and values are not repeated.

    Args:
        query: (R, Hkv, G, Q, D), already scaled.
        key, value: the rows' own, each (R, Hkv, S, D).
        prefix: keys and values of the prefix, each (Hkv, P, D), or None.
        shared_by_some: the rows' heads and the index of the layer, or None.
        bias: causal mask of the rows' own keys, added to the scores, (R, 1, Q, S), or None.

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
