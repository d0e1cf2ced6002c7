"""Guessing an answer's next tokens, so that one pass of the model can check several of them.

A small model's answers repeat themselves, the problem's words and, within a group, each other. So what followed the
same few tokens before is a good guess of what follows now (prompt lookup decoding, a drafter for speculative
decoding: Leviathan et al. 2023, arXiv:2211.17192). A guess costs little as long as a pass has few tokens, because the
time then goes into reading the weights; greedy answers are the same with it and without.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.decoding.sharing import matching

# Guesses fill a pass up to this many tokens: a pass of 16 takes 1.6 times as long as one of 6 (docs/performance.md).
PASS_TOKENS = 16
# More at a time pads attention, where every row costs as much as the one with most tokens.
LONGEST = 3
# A guess is tried where it is this likely to be right, for every row of the pass: among many rows one more token of
# one of them is worth less.
MIN_ODDS_A_ROW = 0.05
# So many tokens must have come before alike; the longest match wins.
MATCHES = (3, 2, 1)
# How much each older guess counts less than the next newer one when odds are estimated.
DECAY = 0.7


class Drafts:
    """Guesses for rows of tokens that grow: `guess`, then `add` what really came.

    Args:
        prompts: what the rows begin with.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._rows: list[list[int]] = [[] for _ in prompts]
        self._own: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]  # a match → where what followed it stands
        self._anyones: dict[tuple[int, ...], tuple[int, int]] = {}  # a match → row, and where in it
        self._right, self._wrong = [0.0] * len(prompts), [0.0] * len(prompts)
        self._guesses: list[list[int]] = [[] for _ in prompts]
        for row, prompt in enumerate(prompts):
            self.add(row, prompt)

    def add(self, row: int, tokens: Sequence[int]) -> None:
        """More tokens of a row. What was guessed for them counts as right or wrong, tried or not."""
        right = matching(self._guesses[row], tokens)
        compared = min(len(self._guesses[row]), len(tokens))
        if compared:
            self._right[row] = self._right[row] * DECAY + right
            self._wrong[row] = self._wrong[row] * DECAY + (right < compared)
        self._guesses[row] = []
        known, own = self._rows[row], self._own[row]
        for token in tokens:
            for size in MATCHES:
                if len(known) >= size:
                    match = tuple(known[-size:])
                    own[match], self._anyones[match] = len(known), (row, len(known))
            known.append(token)

    def guess(self, rows: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """Guesses for these rows' next tokens, at most so many each: the likeliest, and none where a pass is full."""
        if len(rows) >= PASS_TOKENS:
            return [[] for _ in rows]
        likely: list[tuple[float, int]] = []
        for place, (row, limit) in enumerate(zip(rows, most, strict=True)):
            self._guesses[row] = guess = self._looked_up(row)[:limit]
            odds = (self._right[row] + 1) / (self._right[row] + self._wrong[row] + 2)
            likely += [(odds**length, place) for length in range(1, len(guess) + 1)]
        likely.sort(key=lambda found: -found[0])
        counts = [0] * len(rows)
        for odds, place in likely[: PASS_TOKENS - len(rows)]:
            counts[place] += odds >= MIN_ODDS_A_ROW * len(rows)
        return [self._guesses[row][:count] for row, count in zip(rows, counts, strict=True)]

    def _looked_up(self, row: int) -> list[int]:
        """What followed the row's last tokens the last time: in the row itself, else in any."""
        known = self._rows[row]
        for size in MATCHES:
            match = tuple(known[-size:])
            if match in self._own[row]:
                source, start = row, self._own[row][match]
            elif match in self._anyones:
                source, start = self._anyones[match]
            else:
                continue
            found = self._rows[source][start : start + LONGEST]
            while source == row and len(found) < LONGEST:  # it overlaps with what it continues: a loop
                found.append(found[start + len(found) - len(known)])
            return found
        return []
