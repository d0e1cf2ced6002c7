"""`training_config.json`: the settings and facts of a run, and checks before a run is continued."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from common.errors import UserError, UserErrors
from common.processes.ranks import world_size
from common.settings.fields import absolute, flag_of

TRAINING_CONFIG = "training_config.json"
WANDB_RUN = "wandb_run.json"  # id of the W&B run that a resumed run continues
# Values of settings in runs that were stored before the setting existed.
BEFORE = {"cpu_dtype": "float32", "worker_context": "question"}
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def stored_settings(output_dir: Path, given: dict[str, Any], resumable: set[str], script: str) -> dict[str, Any]:
    """The stored settings of a run, with the values that were given now.

    Args:
        output_dir: folder of the run.
        given: settings from the command line.
        resumable: names of settings that may change.
        script: that started the run.

    Raises:
        UserError: if there is no run, or a given value would make it a different run.
    """
    record = read_run_record(output_dir)
    if record.get("script") != script:
        raise UserError(
            f"{output_dir} holds a run of {record.get('script')}, not of {script}: name another --output-dir"
        )
    stored = {**BEFORE, **record["settings"]}
    if isinstance(record.get("four_bit"), bool):
        # The machine decided this if it was not set; the run keeps that choice on any machine.
        stored = {**stored, "use_4bit": record["four_bit"]}
    for name, value in given.items():
        if name not in resumable and stored.get(name) != value and not _same_path(stored.get(name), value):
            raise UserError(
                f"{flag_of(name)} {value} differs from the run in {output_dir} ({stored.get(name)}): "
                "leave the flag out to go on with it, or start anew in another --output-dir"
            )
    return {**stored, **given, "output_dir": str(output_dir)}


def _same_path(stored: Any, given: Any) -> bool:
    """Whether two names mean the same file or folder, such as the stored absolute path and a relative one."""
    names = [os.path.normpath(absolute(name)) for name in (stored, given) if isinstance(name, str)]
    return len(names) == 2 and names[0] == names[1]


@contextmanager
def settings_from(record: Path | None, given: Collection[str]) -> Iterator[None]:
    """Context manager: problems with settings that were read from a file name that file.

    Args:
        record: the file; None if all settings are from the command line.
        given: names of the settings from the command line; problems with these stay as they are.
    """
    try:
        yield
    except UserErrors as error:
        if record is None:
            raise
        flags = {flag_of(name) for name in given}
        own = (line.split()[0].rstrip(":") in flags for line in error.messages)
        lines = [line if is_own else f"{record}: {line}" for line, is_own in zip(error.messages, own, strict=True)]
        raise UserErrors(lines, exit_code=error.exit_code) from error


def check_same_processes(output_dir: Path) -> None:
    """Check that a resumed run has the same number of processes, because each step's questions depend on it.

    Raises:
        UserError: if the number differs.
    """
    stored, found = read_run_record(output_dir).get("processes", 1), world_size()
    if stored != found:
        so_many = f"{stored} process{'' if stored == 1 else 'es'}"
        way = f"torchrun --nproc_per_node {stored}" if stored > 1 else "one process, without a launcher"
        raise UserError(
            f"--resume: the run in {output_dir} has {so_many}, found {found}: go on with {way}, or start anew in "
            "another --output-dir"
        )


def check_same_data(output_dir: Path, found: str) -> None:
    """Check that a resumed run has the same data.

    Args:
        output_dir: folder of the run.
        found: fingerprint of the data now.

    Raises:
        UserError: if it differs from the stored one.
    """
    stored = read_run_record(output_dir).get("data_fingerprint")
    if stored != found:
        raise UserError(
            f"the data have changed since the run began (fingerprint {found}, was {stored}): "
            "restore them, or start anew in another --output-dir"
        )


def run_record(settings: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The content of `training_config.json`: settings, library versions, and facts such as the data's fingerprint."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {"settings": settings, "versions": versions, **facts}


def read_run_record(output_dir: Path) -> dict[str, Any]:
    """The stored record of a run.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    path = output_dir / TRAINING_CONFIG
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["settings"]["output_dir"]
        stored_date(record)
        if not isinstance(record.get("processes", 1), int):
            raise ValueError(f"processes is {record['processes']!r:.40}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if path.exists():
            raise UserError(f"{path} cannot be read ({error}): put a good copy of it there, or start anew") from error
        raise UserError(
            f"there is no {path} to go on from: --output-dir must name the folder of a run; "
            "if the run ended before it wrote this file, start anew"
        ) from error
    return record


def stored_date(record: dict[str, Any]) -> date | None:
    """The date in a run's prompts; None if they contain none.

    Raises:
        ValueError: if the record has something else than a date in its place.
    """
    stored = record.get("prompt_date")
    if stored is None:
        return None
    if not isinstance(stored, str):
        raise ValueError(f"prompt_date is {stored!r:.40}")
    return date.fromisoformat(stored)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
