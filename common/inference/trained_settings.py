"""Settings that an adapter's training run fixed for its later use: the wording of prompts and the limits of plans.

Nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.errors import UserError
from common.problems.questions import check_source
from common.runs.record import TRAINING_CONFIG, settings_from
from common.settings.grpo import TrainingArgs
from common.settings.inference import PROMPT_SETTINGS, ServingArgs


def is_on_this_machine(url: str) -> bool:
    """Whether a server's address is on this machine, so that folders it names are folders here."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def find_training_config(given: str | None, url: str, adapter_root: str | None) -> Path | None:
    """The training_config.json to use: the one named, or else that of the served adapter if it is on this machine.

    Args:
        given: file named on the command line, or None.
        url: address of the server.
        adapter_root: the adapter's folder as the server reports it, or None.

    Raises:
        UserError: if the named file does not exist.
    """
    if given is not None:
        path = Path(given)
        if not path.is_file():
            wrong = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"--training-config {given} {wrong}: name the adapter's {TRAINING_CONFIG}")
        return path
    if adapter_root is None or not is_on_this_machine(url):
        return None
    path = Path(adapter_root) / TRAINING_CONFIG
    return path if path.is_file() else None


def read_training_settings(path: Path) -> dict[str, Any]:
    """The settings that a training run stored.

    Raises:
        UserError: if the file contains no settings.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        if not isinstance(settings, dict):
            raise TypeError("its settings are no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no {TRAINING_CONFIG} of a run ({type(error).__name__}: {error}): name a good one with "
            "--training-config"
        ) from error
    return settings


def check_given_config(given: Mapping[str, Any], *, benchmark: bool) -> None:
    """Check the file of `--training-config`, and the source of questions that a benchmark would take from it.

    Raises:
        UserError: if the file contains no settings or invalid ones, or if the source cannot be used.
    """
    args = ServingArgs(**given)
    config = find_training_config(args.training_config, args.base_url, None)
    if config is None:
        return
    trained = read_training_settings(config)
    with settings_from(config, given):
        with_trained(given, trained).validate()
    if benchmark and args.dataset is None:
        check_source(benchmark_source(args, trained), "test")


def benchmark_source(args: ServingArgs, trained: Mapping[str, Any]) -> str:
    """Source of a benchmark's questions: the one that the flags name, or else the one of the adapter's training."""
    return args.dataset or trained.get("eval_dataset") or trained.get("dataset") or TrainingArgs.dataset


def with_trained(given: Mapping[str, Any], trained: Mapping[str, Any]) -> ServingArgs:
    """Combine settings; later ones win: defaults, those of the adapter's training, explicit flags.

    Args:
        given: explicit flags.
        trained: stored settings of the training; only those about prompts and limits of plans are used.
    """
    brought = {name: trained[name] for name in PROMPT_SETTINGS if trained.get(name) is not None}
    return ServingArgs(**{**brought, **given})
