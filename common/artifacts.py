"""What a run leaves on disk: guarded, atomic, resumable. Nothing heavy is imported here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from common.args import PACKAGED_MODEL, flag_of
from common.errors import UserError

TRAINING_CONFIG = "training_config.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
_RUN_FILES = (
    TRAINING_CONFIG,
    "metrics.jsonl",
    "samples.jsonl",
    "adapter_model.safetensors",
    "adapter_config.json",
)
_CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def holds_run(output_dir: Path) -> bool:
    """Whether a folder holds something a run made."""
    return any((output_dir / name).exists() for name in _RUN_FILES) or any(output_dir.glob("checkpoint-*"))


def check_output_dir(output_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """Stop before anything could be lost or turn out unwritable at the end.

    Raises:
        UserError: when the folder cannot be written, or holds a run and nothing says what to do with it.
    """
    check_writable(output_dir, "--output-dir")
    if holds_run(output_dir) and not overwrite and not resume:
        resumable = "continue it with --resume, " if complete_checkpoints(output_dir) else ""
        raise UserError(
            f"--output-dir {output_dir} already holds a run: {resumable}replace it with --overwrite, "
            "or name another folder"
        )


def check_writable(folder: Path, flag: str) -> Path:
    """Try to write where a folder is, or will be made.

    Returns:
        the folder itself, or the nearest one above it that exists.

    Raises:
        UserError: when that is no folder or cannot be written.
    """
    if not str(folder).strip() or folder == Path():
        raise UserError(f"{flag} is empty: name a folder")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is a file: name a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written ({error.strerror}): name another folder") from error
    return existing


def clear_run(output_dir: Path) -> None:
    """Remove what an earlier run made, and nothing else."""
    for name in (*_RUN_FILES, "training_curves.png", "evaluation.json", "evaluation.png"):
        (output_dir / name).unlink(missing_ok=True)
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a whole file or leave the old one: a crash never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        share(Path(temporary))
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, readable for people."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish_folder(source: Path, target: Path) -> None:
    """Move finished files from a temporary folder on the same disk into place, each in one step."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        share(path)
        path.replace(target / path.name)


def save_adapter(model: Any, tokenizer: Any, output_dir: Path) -> None:
    """Save adapter and tokenizer so that either the old files or the new ones are there, never a mix of halves."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".saving-") as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled template of a card
        save_tokenizer(tokenizer, folder)
        publish_folder(folder, output_dir)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Tokenizer and chat template.

    Also special_tokens_map.json, which transformers 5 no longer writes but older loaders read.
    """
    tokenizer.save_pretrained(folder)
    write_json(folder / "special_tokens_map.json", tokenizer.special_tokens_map)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(filter(_is_complete, found), key=checkpoint_step)


def newest_checkpoint(output_dir: Path) -> Path:
    """The checkpoint to resume from.

    Raises:
        UserError: when there is no complete one.
    """
    complete = complete_checkpoints(output_dir)
    if not complete:
        raise UserError(
            f"--resume: {output_dir} holds no complete checkpoint: start anew with --overwrite, or name another folder"
        )
    return complete[-1]


def stored_settings(output_dir: Path, given: dict[str, Any], resumable: set[str], script: str) -> dict[str, Any]:
    """The settings a run was started with, and what was given anew.

    Raises:
        UserError: when there is no run, or for a given value that would make it another run.
    """
    record = read_run_record(output_dir)
    if record.get("script") != script:
        raise UserError(
            f"{output_dir} holds a run of {record.get('script')}, not of {script}: name another --output-dir"
        )
    stored = record["settings"]
    for name, value in given.items():
        if name not in resumable and stored.get(name) != value:
            raise UserError(
                f"{flag_of(name)} {value} differs from the run in {output_dir} ({stored.get(name)}): "
                "leave the flag out to go on with it, or start anew in another --output-dir"
            )
    return {**stored, **given, "output_dir": str(output_dir)}


def check_same_data(output_dir: Path, found: str) -> None:
    """Stop when a run would go on with other data.

    Raises:
        UserError: when their fingerprint is not the stored one.
    """
    stored = read_run_record(output_dir).get("data_fingerprint")
    if stored != found:
        raise UserError(
            f"the data have changed since the run began (fingerprint {found}, was {stored}): "
            "restore them, or start anew in another --output-dir"
        )


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser step a checkpoint was taken after."""
    return int(checkpoint.name.split("-")[-1])


def _is_complete(checkpoint: Path) -> bool:
    """Whether every file needed to resume is there and whole."""
    if not all((checkpoint / name).is_file() for name in _CHECKPOINT_FILES):
        return False
    states = [*checkpoint.glob("rng_state*.pth"), checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except ValueError:
        return False
    return (
        len(states) > 2
        # torch writes zip files, whose directory stands at the end: a cut-off one has none.
        and all(zipfile.is_zipfile(path) for path in states)
        and safetensors_problem(checkpoint / "adapter_model.safetensors") is None
    )


def safetensors_problem(path: Path) -> str | None:
    """Why a safetensors file is not whole, or None. Reads the header only.

    Format: 8 bytes of header length, a JSON header with each tensor's data_offsets, the data
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
        except ValueError:
            return f"{path} is not a safetensors file"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{path} has {size} bytes, its header promises {expected}"


def read_adapter_config(adapter_path: str, flag: str = "--adapter-path") -> dict[str, Any]:
    """The config of a LoRA adapter folder, after cheap checks that it is one and whole.

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
        config = json.loads((folder / "adapter_config.json").read_text())
    except ValueError as error:
        raise UserError(
            f"{folder / 'adapter_config.json'} is not valid JSON ({error}): save the adapter anew"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{flag} {adapter_path}: found an adapter of type {kind!r}, a LoRA adapter is needed")
    problem = safetensors_problem(folder / "adapter_model.safetensors")
    if problem is not None:
        raise UserError(f"{flag}: {problem}: copy or save the adapter anew")
    return config


def check_base_model(base_model: str) -> None:
    """Stop for a base model that is a path to nothing, or an unknown packaged one; Hub ids need the network.

    Raises:
        UserError: with what was found there.
    """
    folder = Path(base_model).expanduser()
    if not base_model.strip():
        raise UserError("--base-model is empty: name a Hub id or a folder")
    if base_model.startswith("packaged/") and base_model != PACKAGED_MODEL:
        raise UserError(f"--base-model {base_model} is not packaged: {PACKAGED_MODEL} is")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"--base-model {base_model} holds no config.json: name the folder of a Hugging Face model")
    if not folder.exists() and (base_model.startswith((".", "/", "~")) or base_model.count("/") > 1):
        raise UserError(f"--base-model {base_model} does not exist: name a folder or a Hub id (owner/name)")


def check_adapter_base(adapter_path: str, base_model: str, aliases: tuple[str, ...] = ()) -> None:
    """Stop when an adapter names another base model than the one in use.

    Folders and Hub ids may name the same model, so the last part of the name decides.

    Raises:
        UserError: when they differ.
    """
    recorded = read_adapter_config(adapter_path).get("base_model_name_or_path") or ""
    names = {Path(name).name.casefold() for name in (base_model, *aliases)}
    if recorded and Path(recorded).name.casefold() not in names:
        raise UserError(
            f"--adapter-path {adapter_path} was trained on {recorded}, not on {base_model}: use --base-model {recorded}"
        )


def adapter_origin(adapter_path: str, base_model: str | None) -> tuple[dict[str, Any], str]:
    """What is known of an adapter: the record of its training ({} without one), and the base model's name.

    Args:
        adapter_path: its folder.
        base_model: the base model the user named, or None for the one that the adapter names.

    Raises:
        UserError: for an adapter that is not whole, names no base or names another one.
    """
    try:
        config = read_adapter_config(adapter_path)
        record = read_json(Path(adapter_path) / TRAINING_CONFIG) or {}
    except OSError as error:
        raise UserError(f"--adapter-path {adapter_path} cannot be read ({error.strerror})") from error
    recorded = config.get("base_model_name_or_path") or ""
    if base_model is not None:
        check_base_model(base_model)
        check_adapter_base(adapter_path, base_model)
        return record, base_model
    if not recorded:
        raise UserError(f"--adapter-path {adapter_path} does not say what it was trained on: add --base-model")
    # The adapter's config has the path a name was resolved to; the name itself also means something elsewhere.
    named = str(record.get("settings", {}).get("base_model", ""))
    base = named if named and Path(named).name == Path(recorded).name else str(recorded)
    check_base_model(base)
    return record, base


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is no file.

    Raises:
        UserError: for a file that holds no JSON object.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object: mend or remove it")
    return value


def run_record(settings: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """What `training_config.json` holds: settings, library versions, and facts such as the data fingerprint."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {"settings": settings, "versions": versions, **facts}


def read_run_record(output_dir: Path) -> dict[str, Any]:
    """The stored record of a run.

    Raises:
        UserError: when there is none to read.
    """
    path = output_dir / TRAINING_CONFIG
    try:
        record = json.loads(path.read_text())
        record["settings"]["output_dir"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "there is none" if not path.exists() else f"it cannot be read: {error}"
        raise UserError(f"no {path} to go on from ({reason}): --output-dir must name the folder of a run") from error
    return record


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def share(path: Path) -> None:
    """Give a file made by `tempfile` (mode 600) the mode any other new file would have."""
    umask = os.umask(0)
    os.umask(umask)
    if path.is_file():
        path.chmod(0o666 & ~umask)
