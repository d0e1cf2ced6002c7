"""Reordered copies of the weights, which make matrix products faster on a CPU while text is generated.

A decoding step multiplies a few rows by every weight of the model. oneDNN is 1.2 to 2 times as fast as the default
library when a weight was reordered into oneDNN's blocked layout before (`docs/performance.md`). The results are equal
except for rounding. The copy needs as much memory as the weights, so it exists only while a batch is generated and is
freed before gradients need memory.

On a processor with bf16 instructions the copy may be in bf16: twice as fast again, with half the memory. Only the
products are in bf16; sums, inputs, outputs and everything else stay in fp32. The difference of the two most likely
tokens is often smaller than the precision of bf16, so the logits of the likely tokens are computed again in fp32. Then
nothing needs the fp32 weights of linear layers either, and `store_in_bf16` drops them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from common.processes.heap import return_freed_memory

# Expected number of rows, on which the layout depends. A layout for 16 serves 4 to 500 rows equally well.
ROWS_HINT = 16
# Reordering takes as much time as about ten decoding steps save. With fewer rows or steps than these it costs more.
MIN_ROWS = 4
MIN_STEPS = 16
# Logits so close to the largest of a row are computed in fp32. bf16 has 8 significant bits, so logits up to 128 are off
# by less than half of this. A token below this margin is sampled with odds that are off by a few percent of themselves.
NEAR = 2.0
# Vocabulary entries in a block: the blocks without a logit near the largest are skipped at once.
BLOCK = 64
# Tokens of a row that are near, on average, from which the whole product is computed in fp32.
MOST_NEAR = 128

_kept: ContextVar[ExitStack | None] = ContextVar("kept", default=None)


@contextmanager
def packing_kept() -> Iterator[None]:
    """Context manager: inside it, the copies of the first `packed_linears` are kept and used by later ones."""
    with ExitStack() as stack:
        token = _kept.set(stack)
        try:
            yield
        finally:
            _kept.reset(token)


@contextmanager
def packed_linears(model: Any, *, rows: int, steps: int, cpu_dtype: str = "float32") -> Iterator[None]:
    """Context manager: inside it, linear layers of a model on a CPU use reordered copies of their weights.

    It also works below LoRA, whose base layers are plain linear layers. Other layers are left alone: quantised ones,
    those on other devices, and those whose `forward` was replaced by other code.

    Nested calls use the copies of the outermost; calls inside one `packing_kept` use those of the first. No gradient
    flows through the copies: use it only under `no_grad`, and do not change weights inside.

    Args:
        model: a Hugging Face causal LM.
        rows: most sequences that are generated at once.
        steps: most tokens per sequence. If rows or steps are too few for reordering to save time, fp32 copies are not
            made.
        cpu_dtype: "bfloat16" for copies in bf16. They are made for any number of rows, so that a prompt always has the
            same answer. Any other value means fp32.
    """
    dtype = torch.bfloat16 if cpu_dtype == "bfloat16" else torch.float32
    with ExitStack() as own:
        if dtype == torch.bfloat16 or (rows >= MIN_ROWS and steps >= MIN_STEPS):
            (_kept.get() or own).enter_context(_packed(model, dtype))
        yield


@contextmanager
def _packed(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Context manager: replace `forward` of every suitable layer."""
    packed = []
    head = model.get_output_embeddings()
    try:
        for module in filter(_packable, model.modules()):
            # Set on the instance, where `Module.__call__` looks first, so that class and parameters stay unchanged.
            module.forward = _with_copy(module, dtype)
            if module is head and dtype == torch.bfloat16:
                module.forward = partial(_near_in_fp32, module.forward, module.weight.detach(), module.bias)
            packed.append(module)
        yield
    finally:
        for module in packed:
            del module.forward
        return_freed_memory()  # training cannot reuse the gaps that the copies leave


def _with_copy(module: torch.nn.Linear, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's forward function, with a reordered copy of its weight in this dtype."""
    weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach().to(dtype), ROWS_HINT)
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    return partial(_linear if dtype == torch.float32 else _linear_bf16, weight, bias)


def _packable(module: Any) -> bool:
    return (
        (type(module) is Bf16Linear or (type(module) is torch.nn.Linear and module.weight.dtype == torch.float32))
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
    )


class Bf16Linear(torch.nn.Linear):
    """A frozen linear layer with its weight in bf16: (…, I) → (…, O). Inputs, outputs and bias are fp32.

    Its products are those of an fp32 layer under autocast, which converts the weight at every call.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output: in bf16 under autocast, otherwise in the dtype of the input."""
        if torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.bfloat16()
        # An engine such as DeepSpeed may have converted the weight back to fp32.
        return torch.nn.functional.linear(input.bfloat16(), self.weight.bfloat16(), bias).to(input.dtype)


def store_in_bf16(model: Any) -> None:
    """Convert the weights of a model's linear layers to bf16, for training and generating with products in bf16.

    The language-model head stays in fp32: the logits of likely tokens are computed in fp32.

    Args:
        model: a Hugging Face causal LM in fp32 on a CPU, whose linear layers are not trained.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if _packable(module) and module is not head:
            module.weight = torch.nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
            module.__class__ = Bf16Linear
    return_freed_memory()


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """(…, I) → (…, O); `weight` is in oneDNN's layout. torch.compile uses the same kernel."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _linear_bf16(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """As `_linear`, with a weight in bf16: inputs, outputs and oneDNN's sums are fp32."""
    return torch.ops.mkldnn._linear_pointwise(rows.bfloat16(), weight, bias, "none", [], "").float()


def _near_in_fp32(
    product: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Logits (…, V) of hidden states (…, H): in bf16, but those within NEAR of a row's largest in fp32.

    Args:
        product: the product in bf16.
        weight: the language-model head's, in fp32 (V, H).
        bias: the head's (V), or None.
        hidden: (…, H).
    """
    rows = hidden.reshape(-1, hidden.shape[-1])  # (T, H)
    logits = product(rows)
    row, token = _near_largest(logits)
    if len(row) > MOST_NEAR * len(rows):  # nearly equal odds, as of an untrained model
        logits = torch.nn.functional.linear(rows, weight, bias)
    else:
        exact = torch.linalg.vecdot(rows[row], weight[token])
        logits[row, token] = exact if bias is None else exact + bias[token]
    return logits.view(*hidden.shape[:-1], -1)


def _near_largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and tokens of the logits (T, V) that lie within NEAR of the largest of their row."""
    whole = logits.shape[1] // BLOCK * BLOCK
    blocks = logits[:, :whole].unflatten(1, (-1, BLOCK))  # (T, V / BLOCK, BLOCK)
    best = blocks.amax(dim=2)
    lowest = logits.amax(dim=1) - NEAR
    row, block = (best >= lowest[:, None]).nonzero(as_tuple=True)
    place, offset = (blocks[row, block] >= lowest[row, None]).nonzero(as_tuple=True)
    last_row, last = (logits[:, whole:] >= lowest[:, None]).nonzero(as_tuple=True)
    return torch.cat([row[place], last_row]), torch.cat([block[place] * BLOCK + offset, last + whole])
