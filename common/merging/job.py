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
from common.runs.files import check_writable, megabytes
from common.settings.merge import MergeArgs

# What a 4-bit forward needs beside the weights, and what other programs took since: a GPU fuller than this is left.
GPU_HEADROOM = 1.3
BESIDE_WEIGHTS = 32_000_000  # bytes for tokenizer, configs, report and card


@dataclass(frozen=True)
class Job:
    """A merge that passed every check that needs no weights.

    `base` is what to load; `four_bit` says whether the adapter goes onto the dequantised NF4 weights;
    `dtype` and `size` (bytes) are the result's; `load_dtype` is the wider one of result and base checkpoint;
    `inputs` identifies everything that the result depends on; `rows` of embeddings replace the base's where the
    adapter brings some for added tokens; `quantised_on` is the device of the adapter's training, where it is known.
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
    rows: int | None
    quantised_on: str | None


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
    parameters, resized = check_fit(config, adapter, base)
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = models.load_tokenizer(
        str(adapter) if own_tokenizer else base, revision=None if own_tokenizer else revision
    )
    rows = resized or config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {adapter if own_tokenizer else base} has {len(tokenizer)} tokens, the base model embeds "
            f"{rows}, and the adapter brings no embeddings for the {len(tokenizer) - rows} added ones: save it with "
            "PEFT's save_embedding_layers=True from the training that added them, or, if they were never trained, put "
            "the base model's tokenizer into the adapter's folder"
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
        rows=resized,
        quantised_on=record.get("quantised_on"),
    )


def check_fit(config: Any, adapter: Path, base: str) -> tuple[int, int | None]:
    """Compare the adapter's tensors with those PEFT expects on this base, by name and shape, without any weights.

    Returns:
        (the number of the base model's parameters, the rows of embeddings that the adapter brings for added tokens;
        None where the base's own fit).

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
        rows = _added_rows(empty, found)
        if rows is not None:
            empty.resize_token_embeddings(rows, mean_resizing=False)
    count = sum(parameter.numel() for parameter in empty.parameters())
    remedy = "name the base model that the adapter was trained on with --base-model"
    try:
        settings = PeftConfig.from_pretrained(str(adapter))
        wrapped = get_peft_model(empty, settings, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the adapter in {adapter} does not fit {base} ({models.first_line(error)}): {remedy}"
        ) from error
    # Whole embeddings stand beside the adapter only sometimes: PEFT writes them by rules of its own.
    plain, whole = (
        {
            name: tuple(value.shape)
            for name, value in get_peft_model_state_dict(wrapped, save_embedding_layers=embeddings).items()
        }
        for embeddings in (False, True)
    )
    expected = whole if found.keys() - plain.keys() and not found.keys() - whole.keys() else plain
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
    return count, rows


def _added_rows(empty: Any, found: dict[str, tuple[int, ...]]) -> int | None:
    """How many rows the adapter's own embeddings have, if more than the base's; all that have rows must be there."""
    embeddings, head = empty.get_input_embeddings(), empty.get_output_embeddings()
    tied = head is None or head.weight is embeddings.weight
    names = {module: f"base_model.model.{name}." for name, module in empty.named_modules()}
    rows = []
    for module in (embeddings,) if tied else (embeddings, head):
        own = [shape[0] for name, shape in found.items() if name.startswith(names[module]) and _is_matrix(name, shape)]
        rows.append(max(own, default=0))
    return min(rows) if min(rows) > embeddings.weight.shape[0] else None


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of an embedding layer is the matrix itself, not an update of it."""
    return name.endswith(".weight") and len(shape) == 2 and ".lora_" not in name


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
