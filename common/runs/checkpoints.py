"""Checkpoints: which ones are complete, and which one to resume from.

The state of the optimiser is one file of the trainer, a folder of DeepSpeed with a file of each process, or a file or
folder of FSDP.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from common.errors import UserError
from common.runs.adapters import safetensors_problem
from common.runs.record import read_run_record


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that every process has written to the end, oldest first."""
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


def answers_file(checkpoint: Path, rank: int) -> Path:
    """The file in a checkpoint with the worker's cached answers; each process of a run (`rank`) has its own."""
    return checkpoint / f"worker_answers_{rank}.json"


def _checkpoints(output_dir: Path) -> list[tuple[Path, str | None]]:
    """Checkpoints by step, each with what keeps it from being resumed from."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    processes = _processes(output_dir) if found else 1
    return [(path, _problem(path, processes)) for path in sorted(found, key=checkpoint_step)]


def _processes(output_dir: Path) -> int:
    """How many processes the run has, each of which writes its random states."""
    try:
        stored = read_run_record(output_dir).get("processes")
    except UserError:  # a checkpoint alone: of one process, as far as can be known
        return 1
    return stored if isinstance(stored, int) else 1


def _problem(checkpoint: Path, processes: int) -> str | None:
    """What is missing or cut off of all that is needed to resume, or None."""
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
    # DeepSpeed keeps a schedule of its own among its states.
    if not schedule.is_file() and not (checkpoint / "latest").is_file():
        return "scheduler.pt is missing"
    # torch writes zip files, whose directory stands at the end: a cut-off one has none.
    for path in [*random_states, *optimiser, *([schedule] if schedule.is_file() else [])]:
        if not zipfile.is_zipfile(path):
            return f"{path.relative_to(checkpoint)} is cut off"
    return safetensors_problem(checkpoint / "adapter_model.safetensors")


def _optimiser_states(checkpoint: Path) -> list[Path] | str:
    """The files of the optimiser's state that torch has written, or what is missing of them."""
    for name in ("optimizer.pt", "optimizer.bin"):
        if (checkpoint / name).is_file():
            return [checkpoint / name]
    if (checkpoint / "optimizer_0").is_dir():  # FSDP, sharded: its list of contents is written last
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
