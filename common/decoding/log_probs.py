"""Log-probabilities of tokens in bf16 on a CPU; the gradient is computed in the forward pass.

The language-model head is about a third of a small model's arithmetic in a training step. TRL multiplies by it three
times: for the logits, for the logits again in the backward pass, and in fp32 for the gradient.

Two products in bf16 are enough. With hidden state h, head W (row W_v for token v), p = softmax(W h / temperature) and
chosen token t, the gradient is d log p_t / d h = (W_t − Σ_v p_v W_v) / temperature. The sum is known as soon as the
logits are, so the forward pass computes it and the backward pass only scales it.
"""

from __future__ import annotations

from typing import Any

import torch

# Tokens whose logits are held at once: 25 MB at 49,152 vocabulary entries, about the size of a processor's cache.
TOKENS_AT_ONCE = 128


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
