"""The size of a model and of its adapter. Only the base model's config is read, no weights.

The model is built on torch's meta device, where tensors have a shape but no memory. So the numbers are those of the
modules that a run would load, for every architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.models import LORA_TARGET_MODULES, LoraSettings, check_rank, first_adapted

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that determine how much memory a run needs.

    Attributes:
        parameters: number of all parameters. A head that shares its weights with the embeddings counts once.
        linear: number of weights in linear layers, without the head. 4-bit loading quantises these.
        head: weights of the language-model head (vocabulary × hidden).
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: as in the config.
        stored_bytes: bytes per parameter in the model's files.
        trained: number of the adapter's parameters.
        rank: of the adapter.
        open_layers: number of layers that gradients pass through, from the first adapted layer to the last layer.
        known_head: whether on a CPU the head's products are our own (`common.decoding.log_probs`) instead of TRL's.
    """

    parameters: int
    linear: int
    head: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    stored_bytes: int
    trained: int
    rank: int
    open_layers: int
    known_head: bool

    @property
    def cached_elements(self) -> int:
        """Number of elements in the keys and values of one token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def model_shape(config: Any, args: LoraSettings) -> ModelShape:
    """The shape of a base model with the adapter that a run would train on it.

    Args:
        config: of the base model, as `AutoConfig` gives it.
        args: settings of the run. With `adapter_path`, the shape of that adapter is used.

    Raises:
        UserError: if the base has too few layers or too small matrices for the adapter.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from common.decoding.log_probs import has_known_head

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    layers, hidden, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    if args.adapter_path is not None:
        tensors = adapter_tensors(Path(args.adapter_path))
        ranks = [min(shape) for name, shape in tensors.items() if "lora_" in name]
    else:
        tensors = _new_adapter(linears, args, layers)
        ranks = [args.lora_r]
    adapted = [int(found[1]) for name in tensors if (found := _LAYER.search(name))]
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in linears.values()),
        head=0 if head is None else head.weight.numel(),
        layers=layers,
        hidden=hidden,
        intermediate=getattr(text, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        vocabulary=text.vocab_size,
        stored_bytes=2 if config.dtype in (torch.bfloat16, torch.float16) else 4,
        trained=sum(math.prod(shape) for shape in tensors.values()),
        rank=max(ranks, default=0),
        open_layers=layers - min(adapted, default=0),
        known_head=has_known_head(model),
    )


def _new_adapter(linears: Mapping[str, Any], args: LoraSettings, layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a new LoRA's matrices in the layers of `models.lora_config`: (r, inputs) and (outputs, r) per layer."""
    usual = {name for name in linears if name.rsplit(".", 1)[-1] in LORA_TARGET_MODULES}
    first = first_adapted(args, layers)
    check_rank(args.lora_r, [linears[name] for name in usual or set(linears)])
    shapes: dict[str, tuple[int, ...]] = {}
    for name in usual or set(linears):
        place = _LAYER.search(name)
        if place is None or int(place[1]) >= first:
            shapes[f"{name}.lora_A"] = (args.lora_r, linears[name].in_features)
            shapes[f"{name}.lora_B"] = (linears[name].out_features, args.lora_r)
    return shapes


def adapter_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a saved adapter's tensors."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
