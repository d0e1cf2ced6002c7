"""Adapter folders: save one so that it is always complete, and check one before it is used."""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UserError, UserErrors
from common.models import check_base_model
from common.runs.files import SAVING, publish_folder, read_json, write_json
from common.runs.record import BEFORE, TRAINING_CONFIG
from common.settings.fields import check_values, flag_of
from common.settings.grpo import TrainingArgs
from common.settings.sft import SupervisedArgs

A = TypeVar("A", TrainingArgs, SupervisedArgs)


def save_adapter(model: Any, tokenizer: Any, output_dir: Path) -> None:
    """Save adapter and tokenizer. Every file in the folder is the old or the new one, never an incomplete one."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=SAVING) as temporary:
        folder = Path(temporary)
        # Only "default": the reference policy of a KL penalty is an adapter too, but not a result.
        model.save_pretrained(folder, safe_serialization=True, selected_adapters=["default"])
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card without content
        save_tokenizer(tokenizer, folder)
        publish_folder(folder, output_dir)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer with its chat template.

    Also writes special_tokens_map.json, which transformers 5 no longer writes but older loaders read.
    """
    tokenizer.save_pretrained(folder)
    write_json(folder / "special_tokens_map.json", tokenizer.special_tokens_map)


def safetensors_problem(path: Path) -> str | None:
    """The reason why a safetensors file is incomplete, or None. Reads only the header.

    Format: 8 bytes with the header's length, a JSON header with the data_offsets of each tensor, the data
    (https://huggingface.co/docs/safetensors).
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            return f"{path} is cut off at {size} bytes"
        (length,) = struct.unpack("<Q", head)
        if length > size - 8:
            return f"{path} is cut off or not a safetensors file"
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            return f"{path} is not a safetensors file"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{path} has {size} bytes, its header promises {expected}"


def read_adapter_config(adapter_path: str, flag: str = "--adapter-path") -> dict[str, Any]:
    """The config of a LoRA adapter folder, after quick checks that it is one and is complete.

    Args:
        adapter_path: the folder.
        flag: the flag that names it, for errors.

    Raises:
        UserError: with what is missing or broken.
    """
    folder = Path(adapter_path)
    if not folder.is_dir():
        raise UserError(f"{flag} {adapter_path} is not a folder: name one that holds adapter_config.json")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{flag} {adapter_path} is no LoRA adapter: {name} is missing in it")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / 'adapter_config.json'} is not valid JSON ({error}): save the adapter again"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{flag} {adapter_path}: found an adapter of type {kind!r}, a LoRA adapter is needed")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise UserError(f"{flag} {adapter_path}: its base_model_name_or_path is {base!r:.60}, no name: save it anew")
    problem = safetensors_problem(folder / "adapter_model.safetensors")
    if problem is not None:
        raise UserError(f"{flag}: {problem}: copy or save the adapter again")
    return config


def check_adapter_base(adapter_path: str, base_model: str) -> None:
    """Check that an adapter names the base model in use.

    Folders and Hub ids may name the same model, so the last part of the name decides.

    Args:
        adapter_path: folder of the adapter.
        base_model: in use.

    Raises:
        UserError: if the names differ.
    """
    recorded = read_adapter_config(adapter_path).get("base_model_name_or_path") or ""
    if recorded and _last_part(recorded) != _last_part(base_model):
        named = _named_base(adapter_path, recorded)
        raise UserError(
            f"--adapter-path {adapter_path} was trained on {named}, not on {base_model}: use --base-model {named}"
        )


def _named_base(adapter_path: str, recorded: str) -> str:
    """The base model of an adapter as a user names it, and as it may be valid on other machines.

    Args:
        adapter_path: folder of the adapter. The record of its training, if there is one, has the name that was given.
        recorded: the name in the adapter's config, often a folder of a cache.
    """
    settings = _record_of(adapter_path).get("settings")
    named = settings.get("base_model") if isinstance(settings, dict) else None
    return named if isinstance(named, str) and _last_part(named) == _last_part(recorded) else _hub_id(recorded)


def _record_of(adapter_path: str) -> dict[str, Any]:
    """The record of an adapter's training, which a checkpoint shares with its run; {} without one."""
    folder = Path(adapter_path).resolve()
    record = read_json(folder / TRAINING_CONFIG)
    if record is None and folder.name.startswith("checkpoint-"):
        record = read_json(folder.parent / TRAINING_CONFIG)
    return record or {}


def _last_part(name: str) -> str:
    """The part of a base model's name that its Hub id, a copy in a folder and its folder in the Hub's cache share."""
    return Path(_hub_id(name)).name.casefold()


def _hub_id(name: str) -> str:
    """The Hub id of a model whose folder is in the Hub's cache (…/models--OWNER--NAME/snapshots/…), else the name."""
    found = re.search(r"(?:^|/)models--([^/]+)/snapshots/[^/]+/?$", name)
    return name if found is None else found[1].replace("--", "/", 1)


def check_adds_to_base(adapter_path: str) -> None:
    """Check that an adapter, when it is off, leaves the base model unchanged. Otherwise there is no frozen worker.

    With PEFT 0.21 the base model changes through: initialisations that subtract the adapter's first update from the
    base weights (`update_layer` in peft/tuners/lora/layer.py); trained biases of the base model, which stay when the
    adapter is off (`disable_adapter_layers` in peft/tuners/tuners_utils.py); repeated layers; KaSA's truncated weights.
    Full copies (modules_to_save), trained tokens, DoRA and adapters on embeddings are switched off completely.

    Raises:
        UserError: with what changes the base model.
    """
    config = read_adapter_config(adapter_path)
    start = config.get("init_lora_weights", True)
    reasons = {
        f"init_lora_weights {start!r} subtracts the adapter's first update from the base weights": (
            not isinstance(start, bool) and str(start).casefold() not in _KEEPING_STARTS
        ),
        f"bias {config.get('bias')!r} trains biases of the base": config.get("bias", "none") != "none",
        "layer_replication repeats layers of the base": bool(config.get("layer_replication")),
        "kasa_config cuts singular values off the base weights": bool(config.get("kasa_config")),
    }
    for reason, found in reasons.items():
        if found:
            raise UserError(
                f"--adapter-path {adapter_path}: {reason}, so with the adapter switched off there would be no base "
                "model left as the worker: start from an adapter that only adds to it (init_lora_weights true, bias "
                "'none'; PEFT's path_initial_model_for_weight_conversion converts PiSSA and OLoRA)"
            )


def with_adapters_lora(args: A, given: Mapping[str, Any]) -> A:
    """The settings of a run with the rank, scale, dropout and layers of the adapter that it starts from.

    These belong to the weights, so a run goes on with them whatever its own defaults are, and records them.

    Args:
        args: settings of the run; without `adapter_path` they are returned unchanged.
        given: those from the command line.

    Raises:
        UserError: if a given one differs from the adapter's, or the adapter's are none that a run can have.
    """
    if args.adapter_path is None:
        return args
    config = read_adapter_config(args.adapter_path)
    layers, alpha = config.get("layers_to_transform"), config.get("lora_alpha", 8)
    found = {
        "lora_r": config.get("r", 8),  # where a value is missing, PEFT's default
        "lora_alpha": int(alpha) if isinstance(alpha, float) and alpha.is_integer() else alpha,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "lora_layers": (len(layers) if isinstance(layers, list) else 1) if layers not in (None, []) else None,
    }
    for name, own in found.items():
        if given.get(name, own) != own:
            flag, shown = flag_of(name), "all" if own is None else own
            raise UserError(
                f"{flag} {given[name]} does not change the adapter in --adapter-path {args.adapter_path}, which has "
                f"{shown}: leave {flag} out, or train a new adapter with it"
            )
    changed = replace(args, **found)
    if problems := check_values(changed):
        path = Path(args.adapter_path) / "adapter_config.json"
        raise UserErrors([f"{path}: {problem}: save the adapter again" for problem in problems])
    return changed


def check_adapter_prompts(adapter_path: str, told: dict[str, Any]) -> str | None:
    """Check that an adapter's planner was trained with the prompts of this run, as far as its record says.

    A planner that was told that the worker sees the whole question writes other parts than one that was told that it
    sees a part alone. Nothing else would show the mistake: the run would only learn less.

    Args:
        adapter_path: folder of the adapter.
        told: the settings that change the planner's prompt, with the values of this run.

    Returns:
        The data set that the adapter was trained on. None if there is no record, or one of published planning data,
        which have prompts of their own.

    Raises:
        UserError: if a setting differs; the message names both ways out.
    """
    record = read_json(Path(adapter_path) / TRAINING_CONFIG) or {}
    settings = record.get("settings")
    if not isinstance(settings, dict) or settings.get("format") == "planning-data":
        return None
    for name, value in told.items():
        trained = settings.get(name, BEFORE.get(name, value))
        if trained != value:
            flag = flag_of(name)
            raise UserError(
                f"--adapter-path {adapter_path} was trained with {flag} {trained}, this run has {value}: its planner "
                f"would get other instructions: use {flag} {trained}, or train the adapter again with {flag} {value}"
            )
    dataset = settings.get("dataset")
    return dataset if isinstance(dataset, str) else None


# Values of PEFT's init_lora_weights, besides true and false, that do not change the base weights.
_KEEPING_STARTS = ("gaussian", "eva", "orthogonal", "mica")


def adapter_origin(adapter_path: str, base_model: str | None) -> tuple[dict[str, Any], str]:
    """The record of an adapter's training ({} without one), and the name of its base model.

    Args:
        adapter_path: folder of the adapter.
        base_model: named by the user, or None for the one that the adapter names.

    Raises:
        UserError: if the adapter is incomplete, names no base model, or names another one.
    """
    try:
        config = read_adapter_config(adapter_path)
        record = _record_of(adapter_path)
    except OSError as error:
        raise UserError(f"--adapter-path {adapter_path} cannot be read ({error.strerror})") from error
    recorded = config.get("base_model_name_or_path") or ""
    if base_model is not None:
        check_base_model(base_model)
        check_adapter_base(adapter_path, base_model)
        return record, base_model
    if not recorded:
        raise UserError(f"--adapter-path {adapter_path} does not say what it was trained on: add --base-model")
    base = _named_base(adapter_path, recorded)
    check_base_model(base)
    return record, base
