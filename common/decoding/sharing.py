"""What token lists share, and which of them are best run together: plans made of lengths, before any model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

# Tokens of one forward pass over prompts: full speed on a CPU needs about a hundred.
PIECE_TOKENS = 256
# A kept beginning that is shorter than this saves less than it costs.
MIN_SHARED_PREFIX = 8
# Sharing that saves fewer tokens than this costs more in bookkeeping.
MIN_SAVED = 16
# What only some rows share is read by attention once for each group, not once a row, where that saves so many tokens:
# bringing the rows together costs more otherwise.
MIN_KEPT_APART = 1000
# Attention over another block of rows costs about as much as it does over this many padding tokens.
MIN_UNPADDED = 1000


def matching(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning of two token lists."""
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all prompts share, at least one token of each left over."""
    # In lexicographic order only the extremes need comparing.
    shared = matching(min(map(list, prompts)), max(map(list, prompts)))
    return min(shared, min(map(len, prompts)) - 1)


def shared_heads(rows: Sequence[Sequence[int]]) -> list[int]:
    """How many leading tokens each row should share with a group of others, so that most are saved in all.

    Rows in lexicographic order make a tree of common prefixes; of every branch either the whole becomes one
    group, or its parts do, whichever saves more. At least one token of each row is left over. 0: no group.
    """
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    common = [0] + [matching(rows[a], rows[b]) for a, b in pairwise(order)]
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


def pieces(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar length, of about `PIECE_TOKENS` each."""
    piece: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        piece.append(index)
        if sum(lengths[at] for at in piece) >= PIECE_TOKENS:
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
