"""Keys and values of rows of tokens: what all begin with, what some begin with, and each row's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Part = tuple[torch.Tensor, torch.Tensor]  # keys and values in one layer, each (Hkv, S, D)


def tokens_in(parts: list[Part]) -> int:
    """Tokens of cached keys and values."""
    return parts[0][0].shape[1] if parts else 0


class Heads:
    """What groups of a block's rows begin with after the prefix, such as a question: its keys and values once.

    Args:
        layers: keys and values of N groups, each (N, Hkv, S, D), padded on the right.
        lengths: tokens of each group's, 0 for a group that has none.
        member: the group of each of R rows; every group has a row.
    """

    def __init__(self, layers: list[Part], lengths: Sequence[int], member: Sequence[int]) -> None:
        self._layers, self._of_groups, self._member = layers, lengths, member
        self.lengths = [lengths[group] for group in member]  # of each row's
        self._bias: torch.Tensor | None = None  # added to the scores, (N, 1, 1, S)
        like = layers[0][0]
        if min(lengths) < like.shape[2]:
            padding = (torch.arange(like.shape[2]) >= torch.tensor(lengths)[:, None])[:, None, None]
            self._bias = like.new_zeros(padding.shape).masked_fill(padding, torch.finfo(like.dtype).min)
        # Groups of unlike size are filled up with any row of theirs: of each place its row, and of each row its place.
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
        """From each group's keys and values, a part a layer, or nothing; at least one has something."""
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
        """Those of these rows only; None where they have none."""
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

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Scores of the rows' queries (R, Hkv, T, D): (R, Hkv, T, S)."""
        found = self._by_group(query) @ self._layers[layer][0].transpose(2, 3)
        return self._by_row(found if self._bias is None else found.add_(self._bias))

    def mixed(self, layer: int, odds: torch.Tensor) -> torch.Tensor:
        """Values weighted by the rows' odds (R, Hkv, T, S): (R, Hkv, T, D)."""
        return self._by_row(self._by_group(odds) @ self._layers[layer][1])

    def _by_group(self, states: torch.Tensor) -> torch.Tensor:
        """(R, Hkv, T, X) → (N, Hkv, M · T, X) for groups of M rows."""
        _, heads, turns, size = states.shape
        found = states[self._rows].view(-1, self._most, heads, turns, size)
        return found.transpose(1, 2).reshape(-1, heads, self._most * turns, size)

    def _by_row(self, states: torch.Tensor) -> torch.Tensor:
        """(N, Hkv, M · T, X) → (R, Hkv, T, X)."""
        groups, heads, _, size = states.shape
        found = states.view(groups, heads, self._most, -1, size).transpose(1, 2)
        return found.reshape(groups * self._most, heads, -1, size)[self._places]


class Block:
    """Rows that begin with one prefix: its keys and values once, and each row's own ones, from the left."""

    def __init__(self, prefix: list[Part], before: Sequence[list[Part]], room: int, heads: Heads | None) -> None:
        """`before`: what each row begins with after prefix and head, a part a layer, or nothing; `room`: in tokens."""
        self.prefix, self.room, self.heads = prefix, room, heads
        self.shared = tokens_in(prefix)
        self.lengths = [tokens_in(parts) for parts in before]
        self.clean = max(self.lengths)  # columns up to here hold numbers in every row: memory may hold NaN before
        self._layers: list[Part] = []  # each (R, Hkv, room, D)
        like = next((parts for parts in before if parts), [])
        for number, (key, _) in enumerate(like):
            for store, side in zip(self.layer(number, key), (0, 1), strict=True):
                for row, (parts, length) in enumerate(zip(before, self.lengths, strict=True)):
                    store[row, :, length : self.clean] = 0
                    if parts:
                        store[row, :, :length] = parts[number][side]

    def layer(self, number: int, like: torch.Tensor) -> Part:
        """Room for a layer's keys and values, each (R, Hkv, room, D), of the dtype of `like` (Hkv, …, D)."""
        if number == len(self._layers):
            shape = (len(self.lengths), like.shape[0], self.room, like.shape[-1])
            self._layers.append((like.new_empty(shape), like.new_empty(shape)))
        return self._layers[number]

    def row(self, row: int) -> list[Part]:
        """One row's own keys and values, a part a layer."""
        length = self.lengths[row]
        return [(keys[row, :, :length], values[row, :, :length]) for keys, values in self._layers]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only."""
        if len(rows) < len(self.lengths):
            kept = torch.tensor(rows, dtype=torch.long)
            self._layers = [(keys[kept], values[kept]) for keys, values in self._layers]
            self.lengths = [self.lengths[row] for row in rows]
            if self.heads is not None and rows:
                self.heads = self.heads.select(rows)
