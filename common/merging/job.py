"""Everything about a merge that can be checked without loading weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from common import models
from common.errors import UserError
from common.runs.files import check_writable
from common.settings.merge import MergeArgs

# What a 4-bit forward needs beside the weights, and what other programs took since: a GPU fuller than this is left.
GPU_HEADROOM = 1.3
BESIDE_WEIGHTS = 32_000_000  # bytes for tokenizer, configs, report and card


@dataclass(frozen=True)
class Job:
    """A merge that passed every check that needs no weights.

    `base` is what to load; `four_bit` says whether the adapter goes onto the dequantised NF4 weights;
    `dtype` and `size` (bytes) are the result's; `load_dtype` is the wider one of result and base checkpoint;
    `inputs` identifies everything that the result depends on.
    """

    base: str
    revision: str | None
    adapter: Path
    target: Path
    four_bit: bool
    dtype: torch.dtype
    load_dtype: torch.dtype
    max_shard_size: str
    planner_style: str
    tokenizer: Any
    size: int
    inputs: dict[str, Any]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def prepare(args: MergeArgs, base: str, record: dict[str, Any], inputs: dict[str, Any]) -> Job:
    """Check what needs the libraries but no weights: base, fit of the adapter, tokenizer, free disk.

    Args:
        args: settings of the merge.
        base: name of the base model.
        record: of the adapter's training, {} without one.
        inputs: of `common.merging.certificate.merge_inputs`.

    Raises:
        UserError: with the first thing that is wrong.
    """
    adapter, revision = Path(args.adapter_path), args.revision
    with models.explained(base):
        config = AutoConfig.from_pretrained(models.resolve_model(base), revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "an unknown method")
        raise UserError(
            f"the weights of {base} are stored quantised ({method}), and merging into them would round the update "
            "away: name the unquantised model with --base-model"
        )
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    chosen: torch.dtype = stored if args.dtype == "auto" else getattr(torch, args.dtype)
    parameters = check_fit(config, adapter, base)
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = models.load_tokenizer(
        str(adapter) if own_tokenizer else base, revision=None if own_tokenizer else revision
    )
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {adapter if own_tokenizer else base} has {len(tokenizer)} tokens, the base model "
            f"embeds {rows}: use the tokenizer that belongs to {base}"
        )
    size = parameters * chosen.itemsize
    check_free_disk(args.target, size)
    return Job(
        base=base,
        revision=revision,
        adapter=adapter,
        target=args.target,
        four_bit=inputs["merge_base"] == "nf4",
        dtype=chosen,
        load_dtype=torch.promote_types(stored, chosen),
        max_shard_size=args.max_shard_size,
        planner_style=record.get("settings", {}).get("planner_style", "full"),
        tokenizer=tokenizer,
        size=size,
        inputs=inputs,
    )


def check_fit(config: Any, adapter: Path, base: str) -> int:
    """Compare the adapter's tensors with those PEFT expects on this base, by name and shape, without any weights.

    Returns:
        the number of the base model's parameters.

    Raises:
        UserError: for another base, a wrong rank, missing, unknown or damaged tensors.
    """
    path = adapter / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            broken = next((n for n in found if not torch.isfinite(tensors.get_tensor(n)).all()), None)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({models.first_line(error)}): save the adapter anew") from error
    if broken is not None:
        raise UserError(f"{path} is damaged: {broken} holds NaN or infinite values: save the adapter anew")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in empty.parameters())
    remedy = "name the base model that the adapter was trained on with --base-model"
    try:
        settings = PeftConfig.from_pretrained(str(adapter))
        wrapped = get_peft_model(empty, settings, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the adapter in {adapter} does not fit {base} ({models.first_line(error)}): {remedy}"
        ) from error
    expected = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(wrapped).items()}
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            raise UserError(
                f"the adapter in {adapter} does not fit {base}: {name} has shape {found[name]}, {expected[name]} is "
                f"needed: {remedy}"
            )
    for names, what in ((expected.keys() - found.keys(), "lacks"), (found.keys() - expected.keys(), "has")):
        if names:
            example = min(names)
            raise UserError(
                f"the adapter in {adapter} does not fit {base}: it {what} {len(names)} tensors "
                f"{'that its config promises' if what == 'lacks' else 'that the base has no place for'}, such as "
                f"{example}: {remedy}, or save the adapter anew"
            )
    return count


def check_free_disk(target: Path, size: int) -> None:
    """Stop when the result has no room.

    Raises:
        UserError: with how much is missing.
    """
    existing = check_writable(target, "--local-save-path")
    free = shutil.disk_usage(existing).free
    needed = size + BESIDE_WEIGHTS
    if free < needed:
        raise UserError(
            f"the merged model needs {megabytes(needed)}, {existing} has {megabytes(free)} free: "
            f"{megabytes(needed - free)} are missing: free them, or name another disk with --local-save-path"
        )


def megabytes(size: int) -> str:
    """A size in bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
