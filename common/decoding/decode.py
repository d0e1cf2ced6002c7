"""Batched decoding with any Hugging Face causal LM, used for worker and planner.

It gives the same tokens as one padded `generate` call, with less work:

- Tokens that prompts share (system message, few-shot turns, question) are run once.
- Finished rows leave the batch; with `generate` they stay until the longest row ends.
- The language-model head runs only at positions whose logits are needed.

On a CPU there is also no padding, and shared keys and values are not copied (`common.decoding.branching`). There, the
next tokens are drafted too, so that one forward pass may add several (`common.decoding.drafts`), and a large batch is
divided among copies of the process (`common.processes.forked`).

Letters in shapes: B prompts, T tokens, S width of the padded batch, P tokens of the shared prefix, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

from common.decoding.blocks import Kept
from common.decoding.branching import Branched, Prefixes, can_branch
from common.decoding.drafts import Drafts
from common.decoding.sharing import MIN_SHARED_PREFIX, matching, shared_prefix_length
from common.processes.forked import CAN_FORK, forked, one_thread

# Finished rows are dropped only when they are this share of the batch, because dropping copies the others' KV cache.
DROP_SHARE = 1 / 8
# A batch is divided among processes if each gets at least so many prompts: below that, reading the weights is most of
# a pass, and each process reads them.
MIN_ROWS_EACH = 4
# With fewer rows than that, a model with fewer parameters than this decodes on one thread: its products take less time
# than threads need to wake up and meet. 6 rows of 64 tokens with 135 million: 3.5 s, on two threads 4.5 s.
SMALL_MODEL = 300_000_000
# Nucleus sampling looks at so many of the most likely tokens first: sorting a whole vocabulary takes far longer.
LIKELY = 64


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    kinds: Sequence[Hashable] | None = None,
    prefixes: Prefixes | None = None,
    log_probs: list[list[float]] | None = None,
    kept: Kept | None = None,
) -> list[list[int]]:
    """Continue each prompt: greedily (temperature 0), or by sampling.

    Args:
        model: a causal LM in eval mode; its forward takes `past_key_values` and `logits_to_keep`.
        prompts: B lists of token ids, none empty.
        max_new_tokens: limit of a completion in tokens, end-of-sequence token included.
        eos_ids: token ids that end a completion.
        pad_id: token id that fills shorter prompts on the left; it may equal an end-of-sequence token.
        temperature: 0 takes the most likely token; above 0 tokens are sampled at this temperature.
        top_p: samples are drawn from the nucleus: the fewest most likely tokens whose probabilities add up to top_p.
        generator: random generator for sampling, on the model's device; or one for each prompt, on the CPU, so that a
            prompt's sample does not depend on the rest of the batch. On a CPU, a single one seeds one for each prompt.
        kinds: B labels, equal for prompts that begin alike. Without it all prompts count as one kind.
        prefixes: shared beginnings kept between calls (CPU only). Only for a model whose weights do not change.
        log_probs: an empty list. It is filled with B lists: the log-probability of each sampled token at this
            temperature, with respect to all tokens, not only the nucleus. Only for sampled completions.
        kept: room for the states that go into one of the layers (only where `can_branch` holds). `prefixes` of calls
            without it lack these states.

    Returns:
        B lists of token ids; each ends with an end-of-sequence token unless it was cut off.

    Raises:
        ValueError: if states are to be kept where `can_branch` does not hold.
    """
    labels = list(kinds or [None] * len(prompts))
    by_kind: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(labels):
        by_kind.setdefault(kind, []).append(index)
    branches = can_branch(model)
    if kept is not None and not branches:
        raise ValueError("states are kept on a CPU only, of models with plain causal attention")
    few = branches and len(prompts) < torch.get_num_threads() * MIN_ROWS_EACH
    small = few and sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL
    if branches:
        if temperature > 0 and not isinstance(generator, Sequence):
            generator = _one_each(len(prompts), generator)
        parts = _parts(list(by_kind.values()), 1 if few or not CAN_FORK else torch.get_num_threads())
        if len(parts) > 1:  # read what all prompts of a kind share here, once, and not in each process
            prefixes = {} if prefixes is None else prefixes
            order = [index for mine in by_kind.values() for index in mine]
            with Branched(model, prefixes, kept) as cache:
                cache.keep_prefixes([list(prompts[index]) for index in order], [labels[index] for index in order])
    else:
        parts = list(by_kind.values())

    def run(part: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        rows = [list(prompts[index]) for index in part]
        cache = Branched(model, prefixes, kept, part) if branches else _Repeated(model, pad_id)
        drafts = Drafts(rows) if isinstance(cache, Branched) else None
        source = [generator[index] for index in part] if isinstance(generator, Sequence) else generator
        found: list[list[int]] = [[] for _ in part]
        odds: list[list[float]] = [[] for _ in part if log_probs is not None]
        with cache:
            logits = cache.read(rows, [labels[index] for index in part], max_new_tokens)
            with one_thread() if small else nullcontext():
                _continue(cache, logits, found, odds, max_new_tokens, eos_ids, drafts, temperature, top_p, source)
        return found, odds

    results = forked(run, parts) if branches and len(parts) > 1 else list(map(run, parts))
    outputs: list[list[int]] = [[] for _ in prompts]
    if log_probs is not None:
        log_probs += [[] for _ in prompts]
    for part, (found, odds) in zip(parts, results, strict=True):
        for place, index in enumerate(part):
            outputs[index] = found[place]
            if log_probs is not None:
                log_probs[index] = odds[place]
    return outputs


def _one_each(count: int, generator: torch.Generator | None) -> list[torch.Generator]:
    """Generators for prompts, seeded by another, so that a sample does not depend on how a batch is divided."""
    seeds = torch.randint(2**32, (count,), generator=generator).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _parts(groups: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Divide prompts into `count` parts, one for each process.

    Args:
        groups: indices of prompts, those of one kind side by side.
        count: number of parts.

    Returns:
        Parts of almost equal size. Each has its share of every group, because kinds differ in length, and neighbours
        stay together, because they share most.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    offset = 0
    for group in groups:
        bounds = [(len(group) * number + offset % count) // count for number in range(count + 1)]
        for part, start, end in zip(parts, bounds, bounds[1:], strict=False):
            part += group[start:end]
        offset += len(group)
    return parts


def _continue(
    cache: Branched | _Repeated,
    logits: torch.Tensor,
    outputs: Sequence[list[int]],
    log_probs: Sequence[list[float]],
    most: int,
    eos_ids: frozenset[int],
    drafts: Drafts | None,
    temperature: float,
    top_p: float,
    generator: torch.Generator | list[torch.Generator] | None,
) -> None:
    """Fill the rows' `outputs`, and `log_probs` if there are some, starting from the first token's logits (B, V)."""
    rows = list(range(len(outputs)))  # row of the cache → index in outputs
    guesses: list[list[int]] = [[] for _ in rows]  # drafted tokens that ran after the last token of each row
    done = [False] * len(rows)
    # Random numbers that a row has drawn for drafts. A wrong draft leaves some to later tokens. So each token has
    # the number that it would have without drafts.
    drawn: list[list[float]] = [[] for _ in rows]
    while True:
        open_rows = [place for place, row in enumerate(rows) if not done[row]]
        if temperature == 0:
            picked = logits.argmax(dim=-1)
        elif isinstance(generator, list):
            numbers = []
            for place in open_rows:
                mine = drawn[rows[place]]
                while len(mine) <= len(guesses[place]):
                    mine.append(float(torch.rand(1, generator=generator[rows[place]])))
                numbers += mine[: 1 + len(guesses[place])]
            picked = _sample(logits, temperature, top_p, torch.tensor(numbers, device=logits.device))
        else:
            # Finished rows draw too, so that a row's numbers do not depend on when other rows finish.
            every = torch.rand(len(rows), device=logits.device, generator=generator)
            picked = _sample(logits, temperature, top_p, every[open_rows])
        odds: list[float] = []
        if log_probs:
            odds = torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, picked[:, None])[:, 0].tolist()
        chosen = picked.tolist()  # the model's choice after each token of this pass; with drafts, several per row
        wrong = [0] * len(rows)
        start = 0
        for place in open_rows:
            row = rows[place]
            real = chosen[start : start + 1 + len(guesses[place])]
            right = matching(guesses[place], real)
            wrong[place] = len(guesses[place]) - right
            end = next((turn for turn, token in enumerate(real[:right]) if token in eos_ids), right)
            new = real[: end + 1]
            outputs[row] += new
            if log_probs:
                log_probs[row] += odds[start : start + len(new)]
            del drawn[row][: len(new)]
            start += len(real)
            done[row] = new[-1] in eos_ids or len(outputs[row]) == most
            if drafts is not None:
                drafts.add(row, new)
        if any(wrong):
            cache.forget(wrong)
        left = [place for place in open_rows if not done[rows[place]]]
        if not left:
            return
        if len(rows) - len(left) >= len(rows) * DROP_SHARE:
            cache.select(left)
            rows = [rows[place] for place in left]
            left = list(range(len(rows)))
        guesses = [[] for _ in rows]
        if drafts is not None:
            asked = [rows[place] for place in left]
            found = drafts.guess(asked, [most - len(outputs[row]) - 1 for row in asked])
            for place, guess in zip(left, found, strict=True):
                guesses[place] = guess
        logits = cache.run(
            [[] if done[row] else [outputs[row][-1], *guess] for row, guess in zip(rows, guesses, strict=True)]
        )


def _sample(logits: torch.Tensor, temperature: float, top_p: float, numbers: torch.Tensor) -> torch.Tensor:
    """Sample tokens: (T, V) → (T,).

    Uses inverse-CDF sampling (https://en.wikipedia.org/wiki/Inverse_transform_sampling): the token at which the
    cumulative probability exceeds a uniform random number.

    Args:
        logits: (T, V).
        temperature: above 0.
        top_p: below 1 for nucleus sampling (arXiv:1904.09751).
        numbers: uniform random numbers (T).
    """
    # One random number is needed per token. `torch.multinomial` draws one per vocabulary entry and takes 3 to 10 times
    # as long on a CPU (docs/performance.md).
    # Rounding the cumulative sums to fp32 changes probabilities by less than 1e-7.
    odds = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        return _from_nucleus(odds, top_p, numbers)
    reached = odds.cumsum(dim=-1)
    token = torch.searchsorted(reached, numbers[:, None] * reached[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logits.shape[-1] - 1)  # rounding may exceed the last cumulative sum


def _from_nucleus(odds: torch.Tensor, top_p: float, numbers: torch.Tensor) -> torch.Tensor:
    """Sample from the most likely tokens whose probabilities add up to `top_p`; `odds` is (T, V), `numbers` (T,)."""
    likely, tokens = odds.topk(min(LIKELY, odds.shape[-1]))
    picked = _from_sorted(likely, tokens, top_p, numbers)
    wide = likely.sum(dim=-1) < top_p
    if bool(wide.any()):
        picked[wide] = _from_sorted(*odds[wide].sort(dim=-1, descending=True), top_p, numbers[wide])
    return picked


def _from_sorted(odds: torch.Tensor, tokens: torch.Tensor, top_p: float, numbers: torch.Tensor) -> torch.Tensor:
    """Sample from the nucleus of descending probabilities `odds` (T, n) of `tokens` (T, n)."""
    inside = odds.cumsum(dim=-1) - odds < top_p  # the probability of all likelier tokens
    reached = (odds * inside).cumsum(dim=-1)
    place = torch.searchsorted(reached, numbers[:, None] * reached[:, -1:], right=True)
    place = place.minimum(inside.sum(dim=-1, keepdim=True) - 1)  # rounding may exceed the last cumulative sum
    return tokens.gather(1, place).squeeze(1)


class _Repeated:
    """KV cache for any model and device: a padded batch, with the shared prefix's cache copied for every row."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self._model, self._pad_id, self._device = model, pad_id, next(model.parameters()).device
        self._past = DynamicCache(config=model.config)

    def __enter__(self) -> _Repeated:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to undo."""

    def read(self, prompts: Sequence[list[int]], kinds: Sequence[Hashable], room: int) -> torch.Tensor:
        """Prefill prompts of one kind: the tokens that all share once, the rest as one padded batch.

        Args:
            prompts: B lists of token ids.
            kinds: not used.
            room: not used; the cache grows with every token.

        Returns:
            Logits of each prompt's next token (B, V).
        """
        shared = shared_prefix_length(prompts) if len(prompts) > 1 else 0
        if shared < MIN_SHARED_PREFIX:
            shared = 0
        else:
            self._forward(torch.tensor([prompts[0][:shared]], device=self._device))
            self._past.batch_repeat_interleave(len(prompts))
        own = [row[shared:] for row in prompts]
        width = max(map(len, own))
        tokens = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in own], device=self._device)
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in own], device=self._device)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0) + shared  # (B, S)
        self._mask = torch.cat([real.new_ones(len(own), shared), real], dim=1)  # (B, P + S)
        self._positions = positions[:, -1:]
        return self._forward(tokens, positions)

    def run(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append one token to every row; finished rows have an empty list. Returns the other rows' logits (T, V)."""
        given = [row for row, new in enumerate(tokens) if new]
        new = torch.tensor([[*some, self._pad_id][:1] for some in tokens], device=self._device)
        self._positions = self._positions + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(new, self._positions)[given]

    def forget(self, counts: Sequence[int]) -> None:
        """Nothing to remove: this cache is never used with drafts."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows; indices ascend."""
        keep = torch.tensor(rows, device=self._device)
        self._past.batch_select_indices(keep)
        self._mask, self._positions = self._mask[keep], self._positions[keep]

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Append tokens (B, Q) to the cache and run them. Returns the logits at the last position, (B, V)."""
        return self._model(
            input_ids=tokens,
            attention_mask=None if positions is None else self._mask,
            position_ids=positions,
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
