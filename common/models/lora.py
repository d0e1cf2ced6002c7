"""LoRA adapters on a base model: the adapted layers, the initial weights, and the reference of the KL penalty."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.errors import UserError
from common.models.loading import explained
from common.models.precision import LoraSettings
from common.settings.secrets import first_line


def lora_config(args: LoraSettings, model: Any) -> Any:
    """The `peft.LoraConfig`: the one of `adapter_path`, or a new one for all attention and MLP projections.

    LoRA (arXiv:2106.09685) adds (lora_alpha / lora_r) · B A to each weight.

    Args:
        args: settings of the run.
        model: the base model; it decides which of `LORA_TARGET_MODULES` exist.

    Raises:
        UserError: if the config of `adapter_path` cannot be loaded, the base has fewer layers than `lora_layers`, or
            `lora_r` is larger than any of its matrices can use.
    """
    from peft import LoraConfig, PeftConfig

    if args.adapter_path is not None:
        with explained(args.adapter_path):
            config = PeftConfig.from_pretrained(args.adapter_path)
        config.inference_mode = False
        # PEFT puts in where the base is now, and warns if another name stood here.
        config.base_model_name_or_path = None
        return config
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in LORA_TARGET_MODULES if name in leaves]
    layers = None
    if args.lora_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        layers = list(range(first_adapted(args, count), count))
        targets = targets or _linear_names(model)  # PEFT takes no "all-linear" for some layers only
    linears = [
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in targets and hasattr(module, "in_features")
    ]
    check_rank(args.lora_r, linears)
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        # Models with fused or differently named projections (Phi, GPT-NeoX): let PEFT find the linear layers.
        target_modules=targets or "all-linear",
        layers_to_transform=layers,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _linear_names(model: Any) -> list[str]:
    """Last parts of the names of a model's linear layers, without the head: what PEFT's "all-linear" stands for."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linears = [
        name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D) and part is not head
    ]
    return sorted({name.rsplit(".", 1)[-1] for name in linears})


def check_rank(rank: int, linears: Iterable[Any]) -> None:
    """Refuse a rank above the rank that the largest adapted matrix can have, from which on it only takes memory.

    Args:
        rank: of the adapter.
        linears: the adapted layers, with `in_features` and `out_features`.

    Raises:
        UserError: with the largest rank that some matrix can use.
    """
    most = max((min(linear.in_features, linear.out_features) for linear in linears), default=rank)
    if rank > most:
        raise UserError(
            f"--lora-r {rank}: no matrix of the base model has a rank above {most}, so a higher one adds nothing: give "
            "at most that (8 to 64 is usual)"
        )


def first_adapted(args: LoraSettings, layers: int) -> int:
    """Index of the first layer that a new adapter changes, of a base model with so many layers.

    Raises:
        UserError: if `lora_layers` asks for more layers than there are.
    """
    wanted = layers if args.lora_layers is None else args.lora_layers
    if wanted > layers:
        raise UserError(
            f"--lora-layers {wanted}: the base model has {layers}: give at most that, or leave it out for all"
        )
    return layers - wanted


def load_adapter_weights(model: Any, adapter_path: str) -> None:
    """Load the weights of an adapter folder into a `PeftModel` with the same LoRA settings.

    Raises:
        UserError: if the weights do not fit the model.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        result: Any = set_peft_model_state_dict(model, load_peft_weights(adapter_path, device="cpu"))
    except (RuntimeError, ValueError, OSError) as error:
        remedy = (
            "the adapter has embeddings of its own, as for added tokens: merge it with merge_and_push.py --no-push, "
            "and name the merged model with --base-model"
            if "embed_tokens" in str(error)
            else "name the base model that the adapter was trained on"
        )
        raise UserError(
            f"--adapter-path {adapter_path} does not fit --base-model: {first_line(error)}: {remedy}"
        ) from error
    if result.unexpected_keys:
        raise UserError(
            f"--adapter-path {adapter_path} has weights that the base model lacks, such as "
            f"{result.unexpected_keys[0]}: name the base model that the adapter was trained on"
        )


def add_reference_adapter(model: Any) -> None:
    """Keep a frozen copy of the adapter's present weights, named "ref": the reference policy of TRL's KL penalty.

    Without it, TRL uses the base model as reference, and the penalty would pull a warm-started policy back to the
    base model.
    """
    import torch

    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.copy_(model.get_parameter(name.replace(".ref.", ".default.")))
    model.set_adapter("default")


LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def untrained_layers(model: Any) -> int:
    """How many of the first layers of a known model, which has no head, training leaves as they are.

    What goes into the next layer is then the same in a rollout and in the training step after it. 0 if something before
    the layers is trained, or dropout changes what attention gives.
    """
    outside = (each for name, each in model.named_parameters() if not name.startswith("layers."))
    if any(each.requires_grad for each in outside) or bool(getattr(model.config, "attention_dropout", 0.0)):
        return 0
    trained = [any(each.requires_grad for each in layer.parameters()) for layer in model.layers]
    return trained.index(True) if True in trained else 0
