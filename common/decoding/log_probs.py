"""Log-probabilities of completions: passes with little padding, fewer layers, and a head that takes two products.

**Passes.** TRL runs all completions of a micro-batch in one pass, padded to the longest of its whole generation batch,
each with its own copy of the prompt. Here each distinct prompt is run once, what all prompts begin with is run once for
all of them, and completions of similar length share a pass. Gradients flow through the shared keys and values.

**Layers.** With LoRA on the last layers alone, the layers before them give in training what they gave when the
completions were sampled. So those states are kept then (`common.decoding.blocks.Kept`), and training runs the rest.

**Head.** The language-model head is about a third of a small model's arithmetic in a training step. TRL multiplies by
it three times: for the logits, for the logits again in the backward pass, and in fp32 for the gradient.

Two products are enough, in fp32 or in bf16. With hidden state h, head W (row W_v for token v), chosen token t and
p = softmax(W h / temperature), the gradient is d log p_t / d h = (W_t − Σ_v p_v W_v) / temperature. The sum is known as
soon as the logits are, so the forward pass computes it and the backward pass only scales it. It is computed as
((1 − p_t) W_t − Σ_{v≠t} p_v W_v) / temperature, with 1 − p_t = Σ_{v≠t} p_v: for a token that is almost certain, W_t and
p_t W_t are nearly equal, and their difference would be little but rounding errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, Trainer
from transformers.cache_utils import DynamicLayer

from common.decoding.branching import attention_of, has_known_attention

# What one more pass over a micro-batch costs on a CPU, in tokens: the weights are read again.
TOKENS_OF_A_PASS = 64

# Tokens whose logits are held at once: 25 MB at 49,152 vocabulary entries, about the size of a processor's cache.
TOKENS_AT_ONCE = 128

# Vocabulary entries in one product. For few tokens MKL adds all entries of a product one after the other, in fp32. Next
# to the sum of the likely tokens, the thousands of unlikely ones would each be lost in rounding.
ENTRIES_AT_ONCE = 2048


def passes_by_length(lengths: Sequence[int], cost_of_a_pass: int) -> list[list[int]]:
    """Divide rows into passes so that the fewest tokens are computed.

    A pass costs (rows × its longest row + `cost_of_a_pass`) tokens. Rows that are sorted by length are divided at the
    places that make the sum smallest (the exact minimum, by dynamic programming).

    Args:
        lengths: tokens of each row.
        cost_of_a_pass: what another pass costs besides its tokens, in tokens.

    Returns:
        Indices of the rows of each pass, the longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    cheapest, begins = [0], [0]  # of the first n rows: the smallest cost, and where the last of their passes begins
    for end in range(1, len(order) + 1):
        costs = [cheapest[start] + (end - start) * lengths[order[start]] + cost_of_a_pass for start in range(end)]
        cheapest.append(min(costs))
        begins.append(costs.index(min(costs)))
    passes, end = [], len(order)
    while end:
        passes.append(order[begins[end] : end])
        end = begins[end]
    return passes[::-1]


# Runs R rows of T tokens and adds their keys and values to a cache. Gets ids (R, T), or states that go into some layer
# (R, T, H); an attention mask (R, S + T), whose first S columns are cached; and the cache.
Read = Callable[[torch.Tensor, torch.Tensor, DynamicCache], Any]


def completion_log_probs(
    read: Read,
    prompts: tuple[torch.Tensor, torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: DynamicCache,
    score: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, DynamicCache], tuple[torch.Tensor, torch.Tensor]],
    cost_of_a_pass: int,
    *,
    own_positions: bool,
    states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (nats) of B completions, each (B, T); 0 where there is padding.

    Each distinct prompt is run once. Its gradient is that of all its completions together.

    Args:
        read: runs prompts.
        prompts: what `distinct_prompts` returned for all tokens of the prompts but the last one, which runs with the
            completion because it predicts its first token.
        input_ids: prompts, padded on the left, followed by completions, padded on the right (B, P + T).
        attention_mask: 1 for real tokens (B, P + T).
        cache: an empty KV cache of the model.
        score: gets what `read` gets of R rows, for the last prompt token and the first t tokens of the completions,
            their ids (R, 1 + t), the attention mask of the cached prompts, that token and the completions
            (R, S + 1 + t), and a cache of the prompts. Returns log-probabilities and entropies, whose last t columns
            count.
        cost_of_a_pass: see `passes_by_length`.
        own_positions: whether the model is told each token's position (`positions`), by `read` and `score`. Only so can
            what all prompts begin with be run once, because padding then follows it.
        states: what `read` and `score` get instead of ids (B, P + T, H), or None.
    """
    distinct, member = prompts
    head = distinct.shape[1]
    kept = input_ids.shape[1] - head - 1
    inputs = input_ids if states is None else states
    firsts = [int((member == number).nonzero()[0]) for number in range(len(distinct))]
    cached = _read_prompts(read, distinct, inputs[firsts, :head], cache, cost_of_a_pass if own_positions else None)
    places = torch.arange(1, kept + 1, device=attention_mask.device)
    lengths = (attention_mask[:, -kept:] * places).amax(dim=1).clamp(min=1).tolist()
    passes = passes_by_length(lengths, cost_of_a_pass)
    parts = []
    for rows in passes:
        longest = lengths[rows[0]]
        now = slice(head, head + 1 + longest)
        mask = torch.cat([cached[member[rows]], attention_mask[rows, now]], dim=1)
        found = score(inputs[rows, now], input_ids[rows, now], mask, _for_rows(cache, member[rows]))
        parts.append([torch.nn.functional.pad(part[:, -longest:], (0, kept - longest)) for part in found])
    log_probs, entropies = _in_order(parts, passes)
    return log_probs, entropies


def positions(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the tokens in the last `count` columns of an attention mask (R, S), without padding: (R, count)."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -count:]


def read_tokens(model: Any, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """A `Read` of ids that tells positions. Returns last hidden states (R, T, H); `model` has no head."""
    place = positions(mask, tokens.shape[1])
    found = model(input_ids=tokens, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
    hidden: torch.Tensor = found.last_hidden_state
    return hidden


def read_states(model: Any, first: int, states: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """A `Read` of the states that go into layer `first`: only the layers from there on are run, as by `read_tokens`."""
    count = states.shape[1]
    place = positions(mask, count)
    columns = torch.arange(mask.shape[1], device=mask.device)
    own = columns[-count:, None]
    # Padding sees itself: without any key to see, its softmax would be NaN.
    seen = ((columns <= own) & (mask[:, None, None] == 1)) | (columns == own)  # (R, 1, T, S + T)
    if attention_of(model) != "sdpa":  # eager attention adds its mask to the scores
        seen = torch.zeros_like(seen, dtype=states.dtype).masked_fill(~seen, torch.finfo(states.dtype).min)
    states = states.to(model.norm.weight.dtype)
    turned = model.rotary_emb(states, place)
    for layer in model.layers[first:]:
        states = layer(
            states,
            attention_mask=seen,
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=turned,
        )
    hidden: torch.Tensor = model.norm(states)
    return hidden


def _read_prompts(
    read: Read, distinct: torch.Tensor, inputs: torch.Tensor, cache: DynamicCache, cost_of_a_pass: int | None
) -> torch.Tensor:
    """Fill an empty cache with keys and values of D prompts; return the attention mask of its columns (D, S).

    What all of them begin with is run once, if that saves more than another pass costs.

    Args:
        read: runs inputs.
        distinct: the prompts' ids, padded on the left with -1 (D, P).
        inputs: what `read` gets of them (D, P) or (D, P, H).
        cache: the empty cache.
        cost_of_a_pass: see `passes_by_length`; None if the model gets no positions.
    """
    real = distinct >= 0
    together = 0
    if cost_of_a_pass is not None and len(distinct) > 1:
        prompts = [row[row >= 0] for row in distinct]
        shortest = torch.stack([prompt[: min(map(len, prompts))] for prompt in prompts])
        together = _leading((shortest == shortest[0]).all(dim=0))
        if together * (len(distinct) - 1) <= cost_of_a_pass:
            together = 0
    if together:
        begins = distinct.shape[1] - real.sum(dim=1)  # (D,)
        first = int(begins[0])
        read(inputs[:1, first : first + together], real.new_ones(1, together).long(), cache)
        cache.batch_select_indices(torch.zeros(len(distinct), dtype=torch.long, device=distinct.device))
        rest = int(begins.min()) + together  # before this column there is nothing but padding and what has been run
        real = torch.arange(distinct.shape[1], device=distinct.device) >= begins[:, None] + together
        real, inputs = real[:, rest:], inputs[:, rest:]
    mask = torch.cat([real.new_ones(len(real), together), real], dim=1).long()
    read(inputs, mask, cache)
    return mask


def _leading(equal: torch.Tensor) -> int:
    """How many of the first entries of a vector are true."""
    return int(equal.long().cumprod(dim=0).sum())


def imitated_log_probs(
    model: Any,
    head: torch.Tensor,
    dtype: torch.dtype,
    cache: DynamicCache,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score what B rows should imitate. What all rows begin with is run once, and rows of similar length share a pass.

    Args:
        model: the language model without its head.
        head: weights of the language-model head (V, H).
        dtype: of the products with the head, fp32 or bf16.
        cache: an empty KV cache of the model.
        input_ids: prompts and completions, padded on the right (B, T).
        attention_mask: 1 for real tokens (B, T).
        labels: the tokens to imitate, -100 elsewhere (B, T).

    Returns:
        Log-probabilities, entropies (nats), and whether the token is the most likely one, each (B, T − 1), for the
        tokens after each row's first; 0 where there is nothing to imitate.
    """
    width, count = input_ids.shape[1], len(input_ids)
    asked = ((labels == -100) & (attention_mask == 1) & (input_ids == input_ids[0])).all(dim=0)
    together = max(0, _leading(asked) - 1)  # the last prompt token predicts the first one to imitate
    if together * (count - 1) <= TOKENS_OF_A_PASS:
        together = 0
    else:
        model(input_ids=input_ids[:1, :together], past_key_values=cache, use_cache=True)
    places = torch.arange(1, width + 1, device=attention_mask.device)
    lengths = ((attention_mask * places).amax(dim=1) - together).clamp(min=2).tolist()
    passes = passes_by_length(lengths, TOKENS_OF_A_PASS)
    parts = []
    for rows in passes:
        end = together + lengths[rows[0]]
        hidden = model(
            input_ids=input_ids[rows, together:end],
            attention_mask=attention_mask[rows, :end],
            past_key_values=_for_rows(cache, torch.zeros(len(rows), dtype=torch.long)) if together else None,
            use_cache=together > 0,
        ).last_hidden_state
        targets = labels[rows, together + 1 : end]
        scored = masked_log_probs(hidden[:, :-1], head, targets, targets != -100, 1.0, dtype)
        parts.append([torch.nn.functional.pad(part, (together, width - end)) for part in scored])
    log_probs, entropies, likeliest = _in_order(parts, passes)
    return log_probs, entropies, likeliest


def _in_order(parts: list[list[torch.Tensor]], passes: list[list[int]]) -> Iterator[torch.Tensor]:
    """Join what the passes gave, each one tensor or more with a row for each of its rows, in the order of the rows."""
    back = torch.tensor([row for rows in passes for row in rows], device=parts[0][0].device).argsort()
    return (torch.cat(columns)[back] for columns in zip(*parts, strict=True))


def distinct_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct rows among the first `head` tokens (D, `head`), -1 where padded, and which one each row has (B,)."""
    masked = torch.where(attention_mask[:, :head] == 1, input_ids[:, :head], -1)  # padding can have any token id
    distinct, member = torch.unique(masked, dim=0, return_inverse=True)
    return distinct, member


def _for_rows(cache: DynamicCache, members: torch.Tensor) -> DynamicCache:
    """A cache of the given rows of another one, which stays as it is. Gradients flow to the other's tensors."""
    rows = copy.copy(cache)
    rows.layers = [copy.copy(layer) for layer in cache.layers]
    rows.batch_select_indices(members)
    return rows


def with_trl_head(model: Any) -> tuple[Read, Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """What runs prompts, and what scores completions after them: log-probabilities and entropies by TRL's head."""

    def read(tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> None:
        model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def score(
        _: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labels = tokens.masked_fill(mask[:, -tokens.shape[1] :] == 0, -100)
        scored = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, labels=labels, fused_lm_head=True)
        return scored.log_probs, scored.entropy

    return read, score


def shared_cache(trainer: Trainer) -> DynamicCache | None:
    """An empty KV cache for prompts that are run separately; None if they cannot be.

    They can in one process, with all activations kept, and a plain cache. With recomputed activations there is no
    cache. With several processes, an engine may wrap the model and count its forward passes. Sliding windows and
    recurrent layers need a cache of another kind.
    """
    if trainer.accelerator.num_processes > 1 or trainer.args.activation_checkpointing:
        return None
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    cache = DynamicCache(config=model.config)
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def has_known_head(model: Any) -> bool:
    """Whether a model has a plain linear head and nothing behind it. It may be without weights (meta device)."""
    head = model.get_output_embeddings()
    return type(head) is torch.nn.Linear and head.bias is None and has_known_attention(model)


def frozen_head(model: Any) -> torch.Tensor | None:
    """Weights of a base model's head (V, H), if it is known and frozen and the model runs on a CPU; else None."""
    if not has_known_head(model):
        return None
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight if weight.device.type == "cpu" and not weight.requires_grad else None


def masked_log_probs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    wanted: torch.Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `token_log_probs`, for the wanted ones among (R, T) tokens; 0 elsewhere. `hidden` is (R, T, H)."""
    found = token_log_probs(hidden[wanted], head, targets[wanted], temperature, dtype)
    log_probs, entropies, likeliest = (part.new_zeros(wanted.shape).masked_scatter(wanted, part) for part in found)
    return log_probs, entropies, likeliest


def token_log_probs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of N tokens, entropies of their distributions (nats), and whether each is the most likely one.

    Each is (N,), the first two in fp32. Sums over the vocabulary are computed in fp32. Only the log-probabilities have
    a gradient, and only with respect to `hidden`, because the head is frozen.

    Args:
        hidden: last hidden states (N, H).
        head: weights of the language-model head (V, H).
        targets: ids of the tokens (N,).
        temperature: the logits are divided by it.
        dtype: of the two products, fp32 or bf16.
    """
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _TokenLogProbs.apply(
        hidden, head, targets, temperature, dtype
    )
    return found


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        log_probs, entropies = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        likeliest = targets.new_empty(len(hidden), dtype=torch.bool)
        slopes = torch.empty_like(hidden, dtype=torch.float32)
        weights = head.to(dtype)
        scaled = (hidden.float() / temperature).to(dtype)
        for start in range(0, len(hidden), TOKENS_AT_ONCE):
            now = slice(start, start + TOKENS_AT_ONCE)
            logits = (scaled[now] @ weights.T).float()  # (n, V)
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, targets[now, None])
            likeliest[now] = chosen.squeeze(1) == 0
            odds = logits.exp()
            weighted = torch.linalg.vecdot(odds, logits)
            odds.scatter_(1, targets[now, None], 0)
            others = odds.sum(dim=1, keepdim=True)
            total = chosen.exp() + others
            log_probs[now] = (chosen - total.log()).squeeze(1)
            entropies[now] = total.log().squeeze(1) - weighted / total.squeeze(1)
            slope = others * head[targets[now]]
            for part, rows in zip(odds.split(ENTRIES_AT_ONCE, dim=1), weights.split(ENTRIES_AT_ONCE), strict=True):
                slope -= part.to(dtype) @ rows
            slopes[now] = slope / total
        ctx.save_for_backward(slopes.div_(temperature))
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropies, likeliest)
        return log_probs, entropies, likeliest

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *others: Any) -> tuple[torch.Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(ctx.dtype), None, None, None, None
