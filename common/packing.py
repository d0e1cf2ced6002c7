"""Weights laid out for the CPU's matrix kernels while text is generated.

A decoding step multiplies a few rows by every weight of the model. oneDNN does that 1.2 to 2 times as fast as the
default library when a weight has been reordered into its blocked layout beforehand (`docs/performance.md`), with
the same result but for rounding. The reordered copy costs the memory of the weights again, so it exists only
while a batch is generated and is gone when gradients need memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

# The layout depends on how many rows are expected; one made for 16 serves 4 to 500 rows equally well.
ROWS_HINT = 16
# Reordering costs about ten decoding steps' gain: below this many rows or steps it does not pay.
MIN_ROWS = 4
MIN_STEPS = 16


@contextmanager
def packed_linears(model: Any, *, rows: int, steps: int) -> Iterator[None]:
    """Inside, the plain fp32 linear layers of a model on a CPU run on reordered copies of their weights.

    Works below LoRA (its base layers are plain ones) and leaves alone what is no plain fp32 CPU layer: quantised
    layers, other devices, layers whose forward somebody else has replaced. Nested uses share the outermost's
    copies. No gradient flows through the copies: use it under `no_grad` only, and do not change weights inside.

    Args:
        rows, steps: at most so many sequences will be generated at once, of so many tokens: where that is too
            little to pay for the reordering, nothing is done.
    """
    pays = rows >= MIN_ROWS and steps >= MIN_STEPS
    packed = [module for module in model.modules() if _packable(module)] if pays else []
    for module in packed:
        weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS_HINT)
        # On the instance, where `Module.__call__` looks first: the class and the parameters stay as they are.
        module.forward = partial(_linear, weight, None if module.bias is None else module.bias.detach())
    try:
        yield
    finally:
        for module in packed:
            del module.forward


def _packable(module: Any) -> bool:
    return (
        type(module) is torch.nn.Linear
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """(…, I) → (…, O); `weight` is in oneDNN's own layout. The kernel is the one torch.compile uses for this."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
