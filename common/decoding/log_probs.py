"""Log-probabilities of completions: passes with little padding, and a bf16 head for a CPU.

**Passes.** TRL runs all completions of a micro-batch in one pass, padded to the longest of its whole generation batch,
each with its own copy of the prompt. Here each distinct prompt is run once, and completions of similar length share a
pass.

**Head.** The language-model head is about a third of a small model's arithmetic in a training step. TRL multiplies by
it three times: for the logits, for the logits again in the backward pass, and in fp32 for the gradient.

Two products in bf16 are enough. With hidden state h, head W (row W_v for token v), p = softmax(W h / temperature) and
chosen token t, the gradient is d log p_t / d h = (W_t − Σ_v p_v W_v) / temperature. The sum is known as soon as the
logits are, so the forward pass computes it and the backward pass only scales it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

# What one more pass over a micro-batch costs on a CPU, in tokens: the weights are read again.
TOKENS_OF_A_PASS = 64

# Tokens whose logits are held at once: 25 MB at 49,152 vocabulary entries, about the size of a processor's cache.
TOKENS_AT_ONCE = 128


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


def completion_log_probs(
    model: Any,
    prompts: tuple[torch.Tensor, torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: DynamicCache,
    score: Callable[[torch.Tensor, torch.Tensor, DynamicCache], tuple[torch.Tensor, torch.Tensor]],
    cost_of_a_pass: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (nats) of B completions, each (B, T); 0 where there is padding.

    Each distinct prompt is run once. Its gradient is that of all its completions together.

    Args:
        model: the language model.
        prompts: what `distinct_prompts` returned for all tokens of the prompts but the last one, which runs with the
            completion because it predicts its first token.
        input_ids: prompts, padded on the left, followed by completions, padded on the right (B, P + T).
        attention_mask: 1 for real tokens (B, P + T).
        cache: an empty KV cache of the model.
        score: gets the last prompt token and the first t tokens of the completions of R rows (R, 1 + t), the attention
            mask of prompts and completions (R, P + t), and a cache of the prompts. Returns log-probabilities and
            entropies, whose last t columns count.
        cost_of_a_pass: see `passes_by_length`.
    """
    distinct, member = prompts
    head = distinct.shape[1]
    kept = input_ids.shape[1] - head - 1
    model(
        input_ids=distinct.clamp(min=0),
        attention_mask=(distinct >= 0).long(),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    places = torch.arange(1, kept + 1, device=attention_mask.device)
    lengths = (attention_mask[:, -kept:] * places).amax(dim=1).clamp(min=1).tolist()
    passes = passes_by_length(lengths, cost_of_a_pass)
    parts = []
    for rows in passes:
        longest = lengths[rows[0]]
        end = head + 1 + longest
        found = score(input_ids[rows, head:end], attention_mask[rows, :end], _for_rows(cache, member[rows]))
        parts.append([torch.nn.functional.pad(part[:, -longest:], (0, kept - longest)) for part in found])
    back = torch.tensor([row for rows in passes for row in rows], device=input_ids.device).argsort()
    log_probs, entropies = (torch.cat(columns)[back] for columns in zip(*parts, strict=True))
    return log_probs, entropies


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


def token_log_probs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of N tokens, and the entropies of their distributions (nats), each (N,) in fp32.

    Products are computed in bf16, sums over the vocabulary in fp32. Only the log-probabilities have a gradient, and
    only with respect to `hidden`, because the head is frozen.

    Args:
        hidden: last hidden states (N, H).
        head: weights of the language-model head (V, H).
        targets: ids of the tokens (N,).
        temperature: the logits are divided by it.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _TokenLogProbs.apply(hidden, head, targets, temperature)
    return found


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, entropies = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden, dtype=torch.float32)
        half = head.bfloat16()
        scaled = (hidden.float() / temperature).bfloat16()
        for start in range(0, len(hidden), TOKENS_AT_ONCE):
            now = slice(start, start + TOKENS_AT_ONCE)
            logits = (scaled[now] @ half.T).float()  # (n, V)
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, targets[now, None])
            odds = logits.exp()
            total = odds.sum(dim=1, keepdim=True)
            log_probs[now] = (chosen - total.log()).squeeze(1)
            entropies[now] = total.log().squeeze(1) - torch.linalg.vecdot(odds, logits) / total.squeeze(1)
            slopes[now] = head[targets[now]] - (odds.bfloat16() @ half).float() / total
        ctx.save_for_backward(slopes.div_(temperature))
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(ctx.dtype), None, None, None
