"""Weights laid out for the CPU's matrix kernels while text is generated.

A decoding step multiplies a few rows by every weight of the model. oneDNN does that 1.2 to 2 times as fast as the
default library when a weight has been reordered into its blocked layout beforehand (`docs/performance.md`), with
the same result but for rounding. The reordered copy costs the memory of the weights again, so it exists only
while a batch is generated and is gone when gradients need memory.

Where the processor multiplies bf16 itself, the copy may be in bf16: twice as fast again, in half the memory. Only the
products are, with sums in fp32; what goes in and comes out, and everything else, stays fp32. So does the
language-model head, because the two likeliest tokens are often closer to each other than bf16 can tell.
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
def packed_linears(model: Any, *, rows: int, steps: int, cpu_dtype: str = "float32") -> Iterator[None]:
    """Inside, the plain fp32 linear layers of a model on a CPU run on reordered copies of their weights.

    Works below LoRA (its base layers are plain ones) and leaves alone what is no plain fp32 CPU layer: quantised
    layers, other devices, layers whose forward somebody else has replaced. Nested uses share the outermost's
    copies, and those within one `packing_kept` the first's. No gradient flows through the copies: use it under
    `no_grad` only, and do not change weights inside.

    Args:
        rows, steps: at most so many sequences will be generated at once, of so many tokens: where that is too
            little to pay for the reordering, nothing is done.
        cpu_dtype: "bfloat16" for copies in bf16, but for the language-model head; they are made whatever the number
            of rows, so that a prompt has one answer. Anything else leaves the copies in fp32.
    """
    dtype = torch.bfloat16 if cpu_dtype == "bfloat16" else torch.float32
    with ExitStack() as own:
        if dtype == torch.bfloat16 or (rows >= MIN_ROWS and steps >= MIN_STEPS):
            (_kept.get() or own).enter_context(_packed(model, dtype))
        yield


@contextmanager
def _packed(model: Any, dtype: torch.dtype) -> Iterator[None]:
    packed = []
    head = model.get_output_embeddings()
    try:
        for module in filter(_packable, model.modules()):
            kept = torch.float32 if module is head else dtype
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach().to(kept), ROWS_HINT)
            bias = None if module.bias is None else module.bias.detach().to(kept)
            # On the instance, where `Module.__call__` looks first: the class and the parameters stay as they are.
            module.forward = partial(_linear if kept == torch.float32 else _linear_bf16, weight, bias)
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


def _linear_bf16(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """As `_linear`, on a weight in bf16: fp32 goes in and comes out, and oneDNN sums in fp32."""
    return torch.ops.mkldnn._linear_pointwise(rows.bfloat16(), weight, bias, "none", [], "").float()
