"""All checks of a merge that need no weights."""

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
from common.cli import counted
from common.errors import UserError
from common.runs.files import check_writable, megabytes
from common.settings.merge import MergeArgs

# Room for a 4-bit forward pass and for other programs, as a factor on the weights; a GPU with less is not used.
GPU_HEADROOM = 1.3
BESIDE_WEIGHTS = 32_000_000  # bytes for tokenizer, configs, report and model card


@dataclass(frozen=True)
class Job:
    """A merge that passed every check that needs no weights.

    Attributes:
        base: Hub id or folder of the model to load.
        revision: of a Hub model, or None.
        adapter: folder of the adapter.
        target: folder of the merged model.
        four_bit: whether to merge into the dequantised NF4 weights.
        dtype: of the merged weights.
        load_dtype: the wider one of `dtype` and the dtype of the base model's checkpoint.
        max_shard_size: largest weights file, such as "5GB".
        planner_style: wording of the planner's prompt.
        tokenizer: of the adapter.
        size: of the merged weights, in bytes.
        inputs: identifies everything that the result depends on.
        rows: rows of the adapter's own embeddings, if it has more tokens than the base model; otherwise None.
        quantised_on: device on which the base model was quantised in training, or None if unknown.
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
    """Name of a dtype without `torch.`, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def prepare(args: MergeArgs, base: str, record: dict[str, Any], inputs: dict[str, Any]) -> Job:
    """Check what needs the libraries but no weights: base model, fit of the adapter, tokenizer, free disk space.

    Args:
        args: settings of the merge.
        base: Hub id or folder of the base model.
        record: the adapter's training_config.json, or {} without one.
        inputs: as `common.merging.certificate.merge_inputs` returns them.

    Raises:
        UserError: with the first problem.
    """
    adapter, revision = Path(args.adapter_path), args.revision
    with models.explained(base):
        config = AutoConfig.from_pretrained(models.resolve_model(base), revision=revision, trust_remote_code=False)
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
    """Compare the adapter's tensors with those that PEFT expects on this base model: names and shapes, no weights.

    Args:
        config: of the base model.
        adapter: folder of the adapter.
        base: name of the base model, for errors.

    Returns:
        The base model's number of parameters, and the rows of the adapter's embeddings if it has added tokens (else
        None: the base model's own embeddings fit).

    Raises:
        UserError: for another base model, a wrong rank, or missing, unknown or damaged tensors.
    """
    path = adapter / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            broken = next((n for n in found if not torch.isfinite(tensors.get_tensor(n)).all()), None)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({models.first_line(error)}): save the adapter again") from error
    if broken is not None:
        raise UserError(f"{path} is damaged: {broken} holds NaN or infinite values: save the adapter again")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
        rows = _added_rows(empty, found)
        if rows is not None:
            empty.resize_token_embeddings(rows, mean_resizing=False)
    count = sum(parameter.numel() for parameter in empty.parameters())
    remedy = "name the base model that the adapter was trained on with --base-model"
    try:
        settings = PeftConfig.from_pretrained(str(adapter))
        settings.base_model_name_or_path = None  # else PEFT warns where the base has another name than in training
        wrapped = get_peft_model(empty, settings, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the adapter in {adapter} does not fit {base} ({models.first_line(error)}): {remedy}"
        ) from error
    # PEFT saves whole embeddings with the adapter only in some cases, by rules of its own, so both are accepted.
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
                f"the adapter in {adapter} does not fit {base}: it {what} {counted(len(names), 'tensor')} "
                f"{'that its config promises' if what == 'lacks' else 'that the base has no place for'}, such as "
                f"{example}: {remedy}, or save the adapter again"
            )
    return count, rows


def _added_rows(empty: Any, found: dict[str, tuple[int, ...]]) -> int | None:
    """Rows of the adapter's own embeddings if they exceed the base model's; all embedding layers must have them."""
    embeddings, head = empty.get_input_embeddings(), empty.get_output_embeddings()
    tied = head is None or head.weight is embeddings.weight
    names = {module: f"base_model.model.{name}." for name, module in empty.named_modules()}
    rows = []
    for module in (embeddings,) if tied else (embeddings, head):
        own = [shape[0] for name, shape in found.items() if name.startswith(names[module]) and _is_matrix(name, shape)]
        rows.append(max(own, default=0))
    return min(rows) if min(rows) > embeddings.weight.shape[0] else None


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of an embedding layer is the whole matrix, not a LoRA update of it."""
    return name.endswith(".weight") and len(shape) == 2 and ".lora_" not in name


def check_free_disk(target: Path, size: int) -> None:
    """Check that the disk has room for the result.

    Args:
        target: folder of the merged model.
        size: needed, in bytes.

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
