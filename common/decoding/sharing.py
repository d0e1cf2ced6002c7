"""Decide which leading tokens prompts share, and which prompts run together. Needs only token lists, no model.

`common.decoding.branching` runs and stores the shared tokens.

A head is a run of leading tokens that a group of rows shares. A block is a set of rows that attention processes
together, padded to its longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

# Target size of a forward pass over prompts, in tokens; a CPU reaches full speed at about a hundred.
PIECE_TOKENS = 256
# A shared beginning shorter than this (in tokens) costs more to store than it saves.
MIN_SHARED_PREFIX = 8
# A head that saves fewer tokens than this costs more in bookkeeping than it saves.
MIN_SAVED = 16
# Attention reads a head once per group instead of once per row if that saves at least this many tokens. Below it,
# bringing the rows of a group together costs more.
MIN_KEPT_APART = 1000
# Attention over one more block costs about as much as attention over this many padding tokens.
MIN_UNPADDED = 1000


def matching(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning of two token lists, in tokens."""
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all prompts share; at least one token of each prompt is not counted."""
    # In lexicographic order, the first and the last list share the least.
    shared = matching(min(map(list, prompts)), max(map(list, prompts)))
    return min(shared, min(map(len, prompts)) - 1)


def shared_heads(rows: Sequence[Sequence[int]]) -> list[int]:
    """Length of the head (in tokens) that each row should share with a group of other rows; 0 for no group.

    The lengths are chosen to save the most tokens in total. Rows in lexicographic order form a tree of common
    prefixes. Each branch becomes one group, or is split into its parts, whichever saves more. At least one token of
    each row is not part of its head.
    """
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    common = [0] + [matching(rows[a], rows[b]) for a, b in pairwise(order)]
    shortest = [len(rows[index]) - 1 for index in order]

    def best(low: int, high: int, depth: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Best grouping of the rows order[low:high]: (tokens saved, groups as (low, high, head length))."""
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
    for low, high, head in best(0, len(rows), 50)[1]:  # at most 50 levels, so recursion is never too deep
        for at in range(low, high):
            heads[order[at]] = head
    return heads


def pieces(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Split rows into batches of similar length and about `PIECE_TOKENS` tokens; yields the indices of each batch."""
    piece: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        piece.append(index)
        if sum(lengths[at] for at in piece) >= PIECE_TOKENS:
            yield piece
            piece = []
    if piece:
        yield piece


def block_ends(lengths: Sequence[int]) -> list[int]:
    """Where to cut rows into blocks so that little is padding; returns the end index of each block, ascending.

    A cut is made where it saves the most padding, if that is at least `MIN_UNPADDED` tokens. Rows sorted by length
    need the fewest cuts.

    Args:
        lengths: of the rows, in tokens.
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
