"""Prompt-lookup drafts: guess the next tokens of a completion, so that one forward pass can check several.

A small model's answers often repeat: words of the prompt, their own words, and words of other answers in the group.
So the tokens that once followed the same few tokens are a good draft of what comes next. This is prompt-lookup
decoding (https://github.com/apoorvumang/prompt-lookup-decoding), a drafter for speculative decoding (Leviathan et al.
2023, arXiv:2211.17192).

With few tokens in a pass, most time goes into reading the weights, so a draft costs little. Every draft is checked by
the model: it is right if the token chosen or sampled there is the drafted one. So completions are the same with and
without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.decoding.sharing import matching

# Drafts fill a pass up to this many tokens: a pass of 16 takes 1.6 times as long as one of 6 (docs/performance.md).
PASS_TOKENS = 16
# Longest draft of a row, in tokens. Attention pads every row to the longest, so one long draft costs for all rows.
LONGEST = 3
# A drafted token is tried if its chance of being right is at least this, times the number of rows in the pass. With
# many rows, one more token of one row is worth less.
MIN_ODDS_A_ROW = 0.05
# Numbers of preceding tokens that must match; a longer match is preferred.
MATCHES = (3, 2, 1)
# Factor by which an older draft counts less than the next newer one when a row's hit rate is estimated.
DECAY = 0.7


class Drafts:
    """Drafts for rows of tokens that grow. Call `guess`, then `add` with the tokens that the model really chose.

    Args:
        prompts: token ids that the rows begin with.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._rows: list[list[int]] = [[] for _ in prompts]
        self._own: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]  # match → index behind it in the same row
        self._anyones: dict[tuple[int, ...], tuple[int, int]] = {}  # match → a row, and the index behind it there
        self._right, self._wrong = [0.0] * len(prompts), [0.0] * len(prompts)
        self._guesses: list[list[int]] = [[] for _ in prompts]
        for row, prompt in enumerate(prompts):
            self.add(row, prompt)

    def add(self, row: int, tokens: Sequence[int]) -> None:
        """Append tokens to a row. The row's latest draft counts as right or wrong, whether or not it was tried."""
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
        """Draft the next tokens of these rows.

        Args:
            rows: indices of the rows.
            most: longest draft of each of them, in tokens.

        Returns:
            A list of token ids for each of the rows. The most likely drafts are chosen until the pass is full.
        """
        if len(rows) >= PASS_TOKENS:
            return [[] for _ in rows]
        likely: list[tuple[float, int]] = []
        for place, (row, limit) in enumerate(zip(rows, most, strict=True)):
            self._guesses[row] = guess = self._looked_up(row)[:limit]
            # Rule of succession (https://en.wikipedia.org/wiki/Rule_of_succession): 1/2 before the first draft.
            odds = (self._right[row] + 1) / (self._right[row] + self._wrong[row] + 2)
            likely += [(odds**length, place) for length in range(1, len(guess) + 1)]
        likely.sort(key=lambda found: -found[0])
        counts = [0] * len(rows)
        for odds, place in likely[: PASS_TOKENS - len(rows)]:
            counts[place] += odds >= MIN_ODDS_A_ROW * len(rows)
        return [self._guesses[row][:count] for row, count in zip(rows, counts, strict=True)]

    def _looked_up(self, row: int) -> list[int]:
        """The tokens that followed the row's last tokens at their latest occurrence: in this row, or else in any."""
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
            # If the found tokens reach the end of the same row, the row repeats itself: draft the next repetition.
            while source == row and len(found) < LONGEST:
                found.append(found[start + len(found) - len(known)])
            return found
        return []
