"""The output folder of a run: an older run in it is not replaced without being asked to, nor before the new one stands.

`--overwrite` moves the older run into `replaced_run/` and removes it once the new one has its first checkpoint. If the
new one ends before that, the older one is put back: at once or, after a kill, when the next run starts in the folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.cli import say
from common.errors import UserError
from common.processes.ranks import is_first
from common.runs.checkpoints import complete_checkpoints
from common.runs.files import SAVING, check_writable, remove, remove_unfinished
from common.runs.lock import LOCK_FILE, only_run
from common.runs.record import TRAINING_CONFIG, WANDB_RUN

_RUN_FILES = (
    TRAINING_CONFIG,
    "metrics.jsonl",
    "samples.jsonl",
    "adapter_model.safetensors",
    "adapter_config.json",
)
REPLACED = "replaced_run"  # the older run, whole
_MOVING = ".replacing-run"  # on its way there or back: the rest of it is in place, and nothing of a new one
_REMOVED = f"{SAVING}replaced"  # a name that `remove_unfinished` knows
SETTLING_SECONDS = 60.0
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

    An older run that was to be replaced is put back where the new one does not come to its first checkpoint.

    Raises:
        UserError: if another run holds the folder; and as `check_output_dir`.
    """
    check_writable(output_dir, "--output-dir")
    with only_run(output_dir / LOCK_FILE, f"--output-dir {output_dir}"):
        if not is_first():  # which looks after the folder for all
            yield
            return
        put_back(output_dir)
        check_output_dir(output_dir, overwrite=overwrite, resume=resume)
        remove_unfinished(output_dir)
        try:
            yield
        finally:
            put_back(output_dir)


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
            f"--output-dir {output_dir} already holds a run: {resumable}name another folder, or replace the run and "
            "its checkpoints with --overwrite"
        )


def run_files(output_dir: Path) -> list[Path]:
    """What a run made, and nothing else that is in its folder."""
    named = [output_dir / name for name in (*_RUN_FILES, *_REPORTS)]
    return [path for path in named if path.exists()] + sorted(output_dir.glob("checkpoint-*"))


def set_aside(output_dir: Path) -> None:
    """Move an older run out of the way of one that begins; kills at any moment leave it where `put_back` finds it."""
    found = run_files(output_dir)
    if found:
        (output_dir / _MOVING).mkdir()
        for path in found:
            path.rename(output_dir / _MOVING / path.name)
        (output_dir / _MOVING).rename(output_dir / REPLACED)


def drop_replaced(output_dir: Path) -> None:
    """Remove the older run: the one that replaces it has a checkpoint."""
    if (output_dir / REPLACED).is_dir():
        (output_dir / REPLACED).rename(output_dir / _REMOVED)  # or a kill would leave half of it under its name
        shutil.rmtree(output_dir / _REMOVED)


def put_back(output_dir: Path) -> None:
    """Settle a replacement that has ended: the new run stands if it has a checkpoint, else the older one is back.

    Only while the folder is locked.
    """
    replaced, moving = output_dir / REPLACED, output_dir / _MOVING
    if replaced.is_dir():
        if complete_checkpoints(output_dir):
            drop_replaced(output_dir)
            return
        for path in run_files(output_dir):
            remove(path)
        replaced.rename(moving)
    if moving.is_dir():
        for path in moving.iterdir():
            path.rename(output_dir / path.name)
        moving.rmdir()
        say(f"the run in {output_dir} is as it was: the one that was to replace it ended before its first checkpoint")


def settle_replaced(output_dir: Path) -> None:
    """As `put_back`, before the settings of the run in a folder are read; does nothing where there is nothing to do.

    Raises:
        UserError: while another run holds the folder.
    """
    places = [output_dir / REPLACED, output_dir / _MOVING]
    if any(path.is_dir() for path in places) and is_first():
        with only_run(output_dir / LOCK_FILE, f"--output-dir {output_dir}"):
            put_back(output_dir)
    end = time.monotonic() + SETTLING_SECONDS
    while any(path.is_dir() for path in places):  # another process's first one does it
        if time.monotonic() > end:
            raise UserError(f"{places[0]} has not been put back by the first process of this run: start again")
        time.sleep(0.1)
