"""Weights laid out for the CPU's matrix kernels while text is generated.

A decoding step multiplies a few rows by every weight of the model. oneDNN does that 1.2 to 2 times as fast as the
default library when a weight has been reordered into its blocked layout beforehand (`docs/performance.md`), with
the same result but for rounding. The reordered copy costs the memory of the weights again, so it exists only
while a batch is generated and is gone when gradients need memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

# The layout depends on how many rows are expected; one made for 16 serves 4 to 500 rows equally well.
ROWS_HINT = 16
# Reordering costs about ten decoding steps' gain: below this many rows or steps it does not pay.
MIN_ROWS = 4
MIN_STEPS = 16

_kept: ContextVar[ExitStack | None] = ContextVar("kept", default=None)


@contextmanager
def packing_kept() -> Iterator[None]:
    """Inside, what `packed_linears` packs stays packed to the end of this scope, for the calls that follow."""
    with ExitStack() as stack:
        token = _kept.set(stack)
        try:
            yield
        finally:
            _kept.reset(token)


@contextmanager
def packed_linears(model: Any, *, rows: int, steps: int) -> Iterator[None]:
    """Inside, the plain fp32 linear layers of a model on a CPU run on reordered copies of their weights.

    Works below LoRA (its base layers are plain ones) and leaves alone what is no plain fp32 CPU layer: quantised
    layers, other devices, layers whose forward somebody else has replaced. Nested uses share the outermost's
    copies, and those within one `packing_kept` the first's. No gradient flows through the copies: use it under
    `no_grad` only, and do not change weights inside.

    Args:
        rows, steps: at most so many sequences will be generated at once, of so many tokens: where that is too
            little to pay for the reordering, nothing is done.
    """
    pays = rows >= MIN_ROWS and steps >= MIN_STEPS
    with ExitStack() as own:
        if pays:
            (_kept.get() or own).enter_context(_packed(model))
        yield


@contextmanager
def _packed(model: Any) -> Iterator[None]:
    packed = []
    try:
        for module in filter(_packable, model.modules()):
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS_HINT)
            # On the instance, where `Module.__call__` looks first: the class and the parameters stay as they are.
            module.forward = partial(_linear, weight, None if module.bias is None else module.bias.detach())
            packed.append(module)
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
