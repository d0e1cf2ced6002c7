"""Checkpoints: which ones are complete, and which one to resume from."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from common.errors import UserError
from common.runs.adapters import safetensors_problem
from common.runs.record import TRAINING_CONFIG

_CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that are complete, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    processes = _processes(output_dir) if found else 1
    return sorted((path for path in found if _is_complete(path, processes)), key=checkpoint_step)


def newest_checkpoint(output_dir: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        UserError: if there is none.
    """
    complete = complete_checkpoints(output_dir)
    if not complete:
        raise UserError(
            f"--resume: {output_dir} holds no complete checkpoint: start anew with --overwrite, or name another folder"
        )
    return complete[-1]


def checkpoint_step(checkpoint: Path) -> int:
    """Number of optimiser steps before a checkpoint was saved."""
    return int(checkpoint.name.split("-")[-1])


def answers_file(checkpoint: Path, rank: int) -> Path:
    """The file in a checkpoint with the worker's cached answers; each process of a run (`rank`) has its own."""
    return checkpoint / f"worker_answers_{rank}.json"


def _processes(output_dir: Path) -> int:
    """Number of processes of a run; 1 if its record does not contain it."""
    try:
        stored = json.loads((output_dir / TRAINING_CONFIG).read_text(encoding="utf-8"))["processes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 1
    return stored if isinstance(stored, int) else 1


def _is_complete(checkpoint: Path, processes: int) -> bool:
    """Whether every file needed to resume exists and is complete, including the random states of every process."""
    if not all((checkpoint / name).is_file() for name in _CHECKPOINT_FILES):
        return False
    # Each process writes its own. The first one does not wait for the others before it writes trainer_state.json.
    random_states = list(checkpoint.glob("rng_state*.pth"))
    states = [*random_states, checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return (
        len(random_states) >= max(1, processes)
        # torch writes zip files. Their directory is at the end, so an incomplete file has none.
        and all(zipfile.is_zipfile(path) for path in states)
        and safetensors_problem(checkpoint / "adapter_model.safetensors") is None
    )
