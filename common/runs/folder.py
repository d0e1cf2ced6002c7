"""The output folder of a run. It is replaced only on request, and then everything of the older run is removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.processes.ranks import is_first
from common.runs.checkpoints import complete_checkpoints
from common.runs.files import check_writable, remove_unfinished
from common.runs.lock import LOCK_FILE, only_run
from common.runs.record import TRAINING_CONFIG, WANDB_RUN

_RUN_FILES = (
    TRAINING_CONFIG,
    "metrics.jsonl",
    "samples.jsonl",
    "adapter_model.safetensors",
    "adapter_config.json",
)
_REPORTS = ("training_curves.png", "evaluation.json", "evaluation.jsonl", "evaluation.png", WANDB_RUN)


def holds_run(output_dir: Path) -> bool:
    """Whether a folder contains something that a run made."""
    return any((output_dir / name).exists() for name in _RUN_FILES) or any(output_dir.glob("checkpoint-*"))


@contextmanager
def own_output_dir(output_dir: Path, *, overwrite: bool, resume: bool) -> Iterator[None]:
    """Context manager: lock the output folder against other runs, and remove unfinished files of a killed run.

    Args:
        output_dir: the folder.
        overwrite: whether an older run there may be replaced.
        resume: whether the run there continues.

    Raises:
        UserError: if another run holds the folder; and as `check_output_dir`.
    """
    check_writable(output_dir, "--output-dir")
    with only_run(output_dir / LOCK_FILE, f"--output-dir {output_dir}"):
        check_output_dir(output_dir, overwrite=overwrite, resume=resume)
        if is_first():
            remove_unfinished(output_dir)
        yield


def check_output_dir(output_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """Check before the run that nothing will be lost, and that results can be written.

    Args:
        output_dir: the folder.
        overwrite: whether an older run there may be replaced.
        resume: whether the run there continues.

    Raises:
        UserError: if the folder cannot be written, or holds a run and the flags do not say what to do with it.
    """
    check_writable(output_dir, "--output-dir")
    if holds_run(output_dir) and not overwrite and not resume:
        resumable = "continue it with --resume, " if complete_checkpoints(output_dir) else ""
        raise UserError(
            f"--output-dir {output_dir} already holds a run: {resumable}replace it with --overwrite, "
            "or name another folder"
        )


def clear_run(output_dir: Path) -> None:
    """Remove everything that an earlier run made, and nothing else."""
    for name in (*_RUN_FILES, *_REPORTS):
        (output_dir / name).unlink(missing_ok=True)
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
