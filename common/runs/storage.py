"""Explain a full or failing disk in one line: which file, how much space is missing, how to continue the run."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.processes.launcher import start_command
from common.runs.checkpoints import checkpoint_step, complete_checkpoints
from common.runs.files import megabytes

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FAILING = (*_FULL, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE)
# Libraries that write outside Python give the reason only as text. safetensors and tokenizers include the error number.
# torch does not; it reports that the file is shorter than what was written.
_OS_ERROR = re.compile(r"os error (\d+)")
_TORCH = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+|inline_container\.cc.*write")


@contextmanager
def explained(
    folder: Path, go_on: Callable[[], str], checkpoint_bytes: Callable[[], int] | None = None
) -> Iterator[None]:
    """Context manager: turn a failed write into one line with exit code 1. Other errors pass unchanged.

    Args:
        folder: of the run.
        go_on: returns what to do when there is enough space again.
        checkpoint_bytes: returns the approximate size of a checkpoint in bytes, needed if the run has none yet.

    Raises:
        UserError: with the file, how much is missing and free, and how to continue.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _write_error(error)
        if number is None:
            raise
        raise UserError(
            f"{_failed_file(error, folder)} could not be written: {_reason(number)}"
            f"{_room(number, folder, checkpoint_bytes)}: {go_on()}",
            exit_code=1,
        ) from error


def resume_command(script: str, output_dir: Path) -> str:
    """The command that continues a run, with the launcher and the number of processes that it was started with."""
    return f"{start_command(script)} --output-dir {shlex.quote(str(output_dir))} --resume"


def how_to_resume(script: str, output_dir: Path) -> str:
    """What to do when there is space again: resume from the last complete checkpoint, or start again without one."""
    whole = complete_checkpoints(output_dir)
    if not whole:
        return "make room, then start anew: there is no checkpoint yet"
    return f"make room, then go on after step {checkpoint_step(whole[-1])} with {resume_command(script, output_dir)}"


def _write_error(error: BaseException) -> int | None:
    """Error number of a failed write, or None for another kind of error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FAILING:
            return seen.errno
        text = str(seen)
        named = _OS_ERROR.search(text)
        if named is not None and int(named[1]) in _FAILING:
            return int(named[1])
        if isinstance(seen, RuntimeError) and _TORCH.search(text):
            return errno.ENOSPC
        seen = seen.__cause__ or seen.__context__
    return None


def _failed_file(error: BaseException, folder: Path) -> str:
    """The file that could not be written: from the error, or else the file written last."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.filename is not None:
            return os.fsdecode(seen.filename)
        seen = seen.__cause__ or seen.__context__
    unfinished = _unfinished_checkpoint(folder)
    if type(error).__module__.startswith("safetensors"):  # removes its incomplete file
        return str((unfinished or folder) / "adapter_model.safetensors")
    if type(error) is Exception:  # raised by the tokenizers library
        return str((unfinished or folder) / "tokenizer.json")
    if unfinished is None:
        return f"a file in {folder}"
    written = [path for path in unfinished.rglob("*") if path.is_file()]
    return str(max(written, key=lambda path: path.stat().st_mtime_ns, default=unfinished))


def _unfinished_checkpoint(folder: Path) -> Path | None:
    whole = complete_checkpoints(folder)
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit() and path not in whole]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _reason(number: int) -> str:
    return os.strerror(number)[0].lower() + os.strerror(number)[1:]


def _room(number: int, folder: Path, checkpoint_bytes: Callable[[], int] | None) -> str:
    """How much space is free, and how much is missing for the next checkpoint, if that is known."""
    if number not in _FULL:
        return ""
    free = shutil.disk_usage(folder).free
    whole = complete_checkpoints(folder)
    needed = size_of(whole[-1]) if whole else checkpoint_bytes() if checkpoint_bytes is not None else None
    shown = f" ({megabytes(free)} free"
    if needed is None or number == errno.EDQUOT:  # the room left by a quota cannot be queried
        return f"{shown})"
    # The next attempt overwrites the files of the failed one.
    unfinished = _unfinished_checkpoint(folder)
    missing = needed - free - (0 if unfinished is None else size_of(unfinished))
    told = f", about {megabytes(missing)} missing" if missing > 0 else ""
    return f"{shown}{told}; a checkpoint takes {megabytes(needed)})"


def size_of(folder: Path) -> int:
    """Total size of a folder's files, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
