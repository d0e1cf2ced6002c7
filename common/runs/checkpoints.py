"""Checkpoints: which ones are complete, and which one to resume from.

The optimiser's state has one of three forms: a file that the trainer writes; a folder of DeepSpeed with one file per
process; or a file or folder of FSDP.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from common.errors import UserError
from common.runs.adapters import safetensors_problem
from common.runs.files import read_json
from common.runs.record import TRAINING_CONFIG


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that all processes have written completely, oldest first."""
    return [path for path, problem in _checkpoints(output_dir) if problem is None]


def newest_checkpoint(output_dir: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        UserError: if there is none.
    """
    found = _checkpoints(output_dir)
    complete = [path for path, problem in found if problem is None]
    if complete:
        return complete[-1]
    if found:
        path, problem = found[-1]
        raise UserError(
            f"--resume: no checkpoint in {output_dir} is whole (of {path.name}, {problem}): bring back what is "
            "missing, or start anew in another --output-dir"
        )
    raise UserError(f"--resume: {output_dir} holds no checkpoint: start anew with --overwrite, or name another folder")


def checkpoint_step(checkpoint: Path) -> int:
    """Number of optimiser steps before a checkpoint was saved."""
    return int(checkpoint.name.split("-")[-1])


def is_last(checkpoint: Path) -> bool:
    """Whether a checkpoint is of the last step of its run, as the trainer has stored it."""
    state = read_json(checkpoint / "trainer_state.json") or {}
    return isinstance(state.get("max_steps"), int) and checkpoint_step(checkpoint) >= state["max_steps"]


def answers_file(checkpoint: Path, rank: int) -> Path:
    """The file in a checkpoint with the worker's cached answers; each process of a run (`rank`) has its own."""
    return checkpoint / f"worker_answers_{rank}.json"


def _checkpoints(output_dir: Path) -> list[tuple[Path, str | None]]:
    """Checkpoints in the order of their steps, each with the reason why a run cannot resume from it, or None."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    processes = _processes(output_dir) if found else 1
    return [(path, _problem(path, processes)) for path in sorted(found, key=checkpoint_step)]


def _processes(output_dir: Path) -> int:
    """The number of processes of the run. Each of them writes the states of its random generators."""
    try:
        stored = (read_json(output_dir / TRAINING_CONFIG) or {}).get("processes")
    except UserError:  # a checkpoint without the run's record; assume one process
        return 1
    return stored if isinstance(stored, int) else 1


def _problem(checkpoint: Path, processes: int) -> str | None:
    """Which file that is needed to resume is missing or cut off; None if there is no problem."""
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return "trainer_state.json is cut off"
    random_states = [*checkpoint.glob("rng_state*.pth")]
    if len(random_states) < processes:
        return f"rng_state*.pth of {processes - len(random_states)} of {processes} processes are missing"
    schedule = checkpoint / "scheduler.pt"
    optimiser = _optimiser_states(checkpoint)
    if isinstance(optimiser, str):
        return optimiser
    # DeepSpeed stores its own schedule together with its states.
    if not schedule.is_file() and not (checkpoint / "latest").is_file():
        return "scheduler.pt is missing"
    # torch writes zip files. Their directory is at the end, so a file that was cut off has none.
    for path in [*random_states, *optimiser, *([schedule] if schedule.is_file() else [])]:
        if not zipfile.is_zipfile(path):
            return f"{path.relative_to(checkpoint)} is cut off"
    return safetensors_problem(checkpoint / "adapter_model.safetensors")


def _optimiser_states(checkpoint: Path) -> list[Path] | str:
    """The files with the optimiser's state that torch has written, or a text that says which one is missing."""
    for name in ("optimizer.pt", "optimizer.bin"):
        if (checkpoint / name).is_file():
            return [checkpoint / name]
    if (checkpoint / "optimizer_0").is_dir():  # FSDP with shards; it writes its list of contents last
        return [] if (checkpoint / "optimizer_0" / ".metadata").is_file() else "optimizer_0/.metadata is missing"
    if not (checkpoint / "latest").is_file():
        return "optimizer.pt is missing"
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    states = [*folder.glob("*_states.pt")]
    shards = [path for path in states if path.name.endswith("optim_states.pt")]
    processes = len([*checkpoint.glob("rng_state*.pth")])
    if not any(path.name.endswith("model_states.pt") for path in states):
        return f"{folder.name}/*model_states.pt is missing"
    if shards and len(shards) < processes:
        return f"{folder.name}/*optim_states.pt of {processes - len(shards)} of {processes} processes are missing"
    return states
