"""Checkpoints: which ones are complete, and which one to resume from."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from common.errors import UserError
from common.runs.adapters import safetensors_problem

_CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that are complete, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(filter(_is_complete, found), key=checkpoint_step)


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


def _is_complete(checkpoint: Path) -> bool:
    """Whether every file needed to resume exists and is complete."""
    if not all((checkpoint / name).is_file() for name in _CHECKPOINT_FILES):
        return False
    states = [*checkpoint.glob("rng_state*.pth"), checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return (
        len(states) > 2
        # torch writes zip files. Their directory is at the end, so an incomplete file has none.
        and all(zipfile.is_zipfile(path) for path in states)
        and safetensors_problem(checkpoint / "adapter_model.safetensors") is None
    )
