"""Log-probabilities of tokens in bf16 on a CPU, with most of the gradient found on the way forward.

A small model's head is a third of its arithmetic in a training step. TRL's head multiplies by it three times: for the
logits, for them again in the backward pass, and there, in fp32, for the gradient. But a log-probability's gradient
with respect to the hidden state is the chosen token's row of the head less the expected row, and what is expected is
known as soon as the logits are: two products, both in bf16, and nothing left to do on the way back.
"""

from __future__ import annotations

from typing import Any

import torch

# Logits of so many tokens at once: with 49,152 entries 25 MB, about what a processor's cache holds.
TOKENS_AT_ONCE = 128


def token_log_probs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of N tokens and the entropies (nats) of the distributions they were chosen from, each (N,).

    Products are in bf16, sums over the vocabulary in fp32. Only the log-probabilities have a gradient, and only with
    respect to `hidden`: the head is frozen.

    Args:
        hidden: last hidden states (N, H).
        head: weights of the language-model head (V, H).
        targets: the tokens (N,).
        temperature: logits are divided by it.
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
