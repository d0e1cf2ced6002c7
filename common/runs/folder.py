"""The output folder of a run. An older run in it is replaced only if the user asks for it.

`--overwrite` moves the older run into `replaced_run/`. It is removed as soon as the new run has its first checkpoint.
If the new run ends before that, the older one is moved back. After a kill this happens when the next run starts in the
folder.
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

_TRAINED = ("metrics.jsonl", "samples.jsonl", "adapter_model.safetensors", "adapter_config.json")
REPLACED = "replaced_run"  # the complete older run
_MOVING = ".replacing-run"  # a part of the older run, while it is moved there or back; nothing of a new run exists then
_REMOVED = f"{SAVING}replaced"  # a name that `remove_unfinished` removes
# What a folder may hold before a run writes its record: logs of the shell or a batch system; what vLLM and W&B write
# when they start.
_LOGS, _EARLY = (".log", ".out", ".err"), ("lost+found", "vllm_adapters", "wandb")
SETTLING_SECONDS = 60.0  # how long the other processes wait until the first one has moved a run back
_REPORTS = (TRAINING_CONFIG, "training_curves.png", "evaluation.json", "evaluation.jsonl", "evaluation.png", WANDB_RUN)


def holds_run(output_dir: Path) -> bool:
    """Whether a folder contains what training made.

    A run that ended earlier left only its settings, and rows of its scoreboard. A new run can use these rows, because
    each is stored with all that determines it.
    """
    return any((output_dir / name).exists() for name in _TRAINED) or any(output_dir.glob("checkpoint-*"))


@contextmanager
def own_output_dir(
    output_dir: Path, *, overwrite: bool, resume: bool, adapter_path: str | None = None
) -> Iterator[None]:
    """Context manager: lock the output folder against other runs, and remove unfinished files of a killed run.

    If the run ends before its first checkpoint, an older run that it should replace is moved back.

    Args:
        output_dir: the folder.
        overwrite: whether an older run there may be replaced.
        resume: whether the run there continues.
        adapter_path: the adapter from which the run starts.

    Raises:
        UserError: if another run uses the folder; also as `check_output_dir`.
    """
    check_writable(output_dir, "--output-dir")
    with only_run(output_dir / LOCK_FILE, f"--output-dir {output_dir}"):
        if not is_first():  # only the first process manages the folder
            yield
            return
        put_back(output_dir)
        check_output_dir(output_dir, overwrite=overwrite, resume=resume, adapter_path=adapter_path)
        for folder in (output_dir, *(path for path in output_dir.glob("checkpoint-*") if path.is_dir())):
            remove_unfinished(folder)
        try:
            yield
        finally:
            put_back(output_dir)


def check_output_dir(output_dir: Path, *, overwrite: bool, resume: bool, adapter_path: str | None = None) -> None:
    """Check before the run that nothing will be lost, and that results can be written.

    Args:
        output_dir: the folder.
        overwrite: whether an older run there may be replaced.
        resume: whether the run there continues.
        adapter_path: the adapter from which the run starts.

    Raises:
        UserError: if the folder cannot be written, contains files that are no run's, contains a run and the flags do
            not say what to do with it, or contains the adapter that the run would replace.
    """
    check_writable(output_dir, "--output-dir")
    if not any((output_dir / name).exists() for name in (TRAINING_CONFIG, REPLACED, _MOVING)):
        check_no_others(output_dir, "--output-dir")
    if holds_run(output_dir) and not overwrite and not resume:
        resumable = "continue it with --resume, " if complete_checkpoints(output_dir) else ""
        raise UserError(
            f"--output-dir {output_dir} already holds a run: {resumable}name another folder, or replace the run and "
            "its checkpoints with --overwrite"
        )
    own = output_dir.resolve()
    if overwrite and not resume and adapter_path is not None and own in (Path(adapter_path) / "x").resolve().parents:
        raise UserError(
            f"--adapter-path {adapter_path} lies in --output-dir {output_dir}, whose run --overwrite would remove: "
            "name another --output-dir"
        )


def check_no_others(folder: Path, flag: str) -> None:
    """Refuse a folder that holds somebody's files, which a run would mix with its own. Logs and hidden files may stay.

    Args:
        folder: without a run of this project; it need not exist.
        flag: the flag that names it, for errors.

    Raises:
        UserError: with some of the files.
    """
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in found if not name.startswith(".") and not name.endswith(_LOGS) and name not in _EARLY]
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise UserError(
            f"{flag} {folder} holds other files ({shown}) and no {TRAINING_CONFIG} of a run: name a new or an empty "
            f"folder, such as {folder / 'run'}"
        )


def run_files(output_dir: Path) -> list[Path]:
    """The files that a run made. Other files in its folder are left out."""
    named = [output_dir / name for name in (*_TRAINED, *_REPORTS)]
    return [path for path in named if path.exists()] + sorted(output_dir.glob("checkpoint-*"))


def set_aside(output_dir: Path) -> None:
    """Move an older run out of the way of a new one. After a kill at any moment, `put_back` can move it back."""
    if holds_run(output_dir):
        found = run_files(output_dir)
        (output_dir / _MOVING).mkdir()
        for path in found:
            path.rename(output_dir / _MOVING / path.name)
        (output_dir / _MOVING).rename(output_dir / REPLACED)


def drop_replaced(output_dir: Path) -> None:
    """Remove the older run, after the new one has its first checkpoint."""
    if (output_dir / REPLACED).is_dir():
        (output_dir / REPLACED).rename(output_dir / _REMOVED)  # a kill must not leave a part of it under its name
        shutil.rmtree(output_dir / _REMOVED)


def put_back(output_dir: Path) -> None:
    """End a replacement: keep the new run if it has a checkpoint, else move the older run back.

    Call it only while the folder is locked.
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
    """End an unfinished replacement (`put_back`), so that the settings in the folder are those of the run that stays.

    The first process does it, under the folder's lock; the others wait for it.

    Raises:
        UserError: if another run uses the folder, if the first process does not move the run back in time, or if no
            folder can have this name.
    """
    places = [output_dir / REPLACED, output_dir / _MOVING]
    try:
        places[0].is_dir()
    except OSError as error:  # a name that is too long
        raise UserError(f"--output-dir {output_dir}: {error.strerror}: name another folder") from error
    if any(path.is_dir() for path in places) and is_first():
        with only_run(output_dir / LOCK_FILE, f"--output-dir {output_dir}"):
            put_back(output_dir)
    end = time.monotonic() + SETTLING_SECONDS
    while any(path.is_dir() for path in places):  # the first process moves the run; the others wait
        if time.monotonic() > end:
            raise UserError(f"{places[0]} has not been put back by the first process of this run: start again")
        time.sleep(0.1)
