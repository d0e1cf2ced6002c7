"""`training_config.json`: what a run was started with, and the checks before it is continued."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.settings.fields import flag_of

TRAINING_CONFIG = "training_config.json"
WANDB_RUN = "wandb_run.json"  # which W&B run a resumed run goes on with
# What runs did whose settings were stored before there was one for it.
BEFORE = {"cpu_dtype": "float32"}
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


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
    stored = {**BEFORE, **record["settings"]}
    if isinstance(record.get("four_bit"), bool):
        # Left open, it was decided by the machine; the run goes on with that wherever it is continued.
        stored = {**stored, "use_4bit": record["four_bit"]}
    for name, value in given.items():
        if name not in resumable and stored.get(name) != value:
            raise UserError(
                f"{flag_of(name)} {value} differs from the run in {output_dir} ({stored.get(name)}): "
                "leave the flag out to go on with it, or start anew in another --output-dir"
            )
    return {**stored, **given, "output_dir": str(output_dir)}


def world_size() -> int:
    """How many processes train together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_same_processes(output_dir: Path) -> None:
    """Stop when a run would go on with another number of processes: its steps would hold other groups of questions.

    Raises:
        UserError: with both numbers.
    """
    stored, found = read_run_record(output_dir).get("processes", 1), world_size()
    if stored != found:
        raise UserError(
            f"--resume: the run in {output_dir} has {stored} processes, found {found}: go on with "
            f"{'torchrun --nproc_per_node ' + str(stored) if stored > 1 else 'one process, without a launcher'}, or "
            "start anew in another --output-dir"
        )


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
        record = json.loads(path.read_text(encoding="utf-8"))
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
