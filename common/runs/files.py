"""Write a file so that it is always the complete old or the complete new one; read, check and name files.

Nothing heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError


def check_writable(folder: Path, flag: str) -> Path:
    """Try to write in a folder, or in the nearest existing folder above it.

    Args:
        folder: the folder; it need not exist.
        flag: the flag that names it, for errors.

    Returns:
        The folder itself, or the nearest existing one above it.

    Raises:
        UserError: if that is not a folder or cannot be written.
    """
    if not str(folder).strip() or folder == Path():
        raise UserError(f"{flag} is empty: name a folder")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is a file: name a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written ({error.strerror}): name another folder") from error
    return existing


def check_file_writable(path: Path, flag: str) -> None:
    """Try to write a file; nothing is left behind or changed.

    Args:
        path: the file.
        flag: the flag that names it, for errors.

    Raises:
        UserError: if it cannot be written.
    """
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}): name another place") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context manager: add the file's name to errors of writing it; those of an open file contain none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file so that after a crash it is either the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            # Half of a surrogate pair, which models sometimes emit, becomes its \uXXXX escape; JSON reads it back.
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            share(Path(temporary))
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, so that after a crash the file is either the old or the complete new one."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish_folder(source: Path, target: Path) -> None:
    """Move finished files from a temporary folder to `target` on the same disk; each move is atomic."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        share(path)
        path.replace(target / path.name)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no file.

    Raises:
        UserError: if the file does not hold a JSON object.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object: mend or remove it")
    return value


def share(path: Path) -> None:
    """Give a file created by `tempfile` (mode 600) the mode of any other new file."""
    umask = os.umask(0)
    os.umask(umask)
    if path.is_file():
        path.chmod(0o666 & ~umask)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


SAVING = ".saving-"  # beginning of the names of folders in which an adapter is prepared
# Names of unfinished files and folders that this project writes, those of its earlier versions, and of safetensors.
_UNFINISHED = re.compile(
    rf"{re.escape(SAVING)}[a-z0-9_]{{8}}|\..+\.(?:json|jsonl|png|md)\.(?:\d+\.tmp|[a-z0-9_]{{8}}(?:\.tmp)?)"
    r"|\.tmp[A-Za-z0-9]{6}"
)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run has left unfinished. Call it only while the folder is locked, so no other run writes."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            remove(path)


def remove_unfinished_beside(path: Path) -> None:
    """Remove what a process that was killed within `write_text_atomically(path)` has left. None may be writing it."""
    unfinished = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")
    for other in path.absolute().parent.iterdir():
        if unfinished.fullmatch(other.name):
            remove(other)


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def megabytes(size: int) -> str:
    """A size in bytes as text for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def temporary_beside(path: Path) -> Path:
    """Name of a temporary file for `path`, different in each process."""
    # In the same directory, because os.replace is atomic only within one file system.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
