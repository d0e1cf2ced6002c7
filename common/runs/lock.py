"""A lock that allows one run per output folder. The kernel holds it, so neither a crash nor a reboot leaves it behind.

It uses `flock` on a file instead of the `filelock` package. On file systems without locks, that package creates a
marker file, which a killed run would leave behind. It also cannot store the holder's name in the locked file.

On NFS, Linux asks the server for the lock (NFSv4, or v3 with lockd), so it works between machines too. A share mounted
with `nolock` or `local_lock=flock` knows only the runs of its own machine.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from common.errors import UserError
from common.processes.ranks import is_first

LOCK_FILE = ".run.lock"


@contextmanager
def only_run(lock_file: Path, place: str) -> Iterator[None]:
    """Context manager: hold a folder's lock. Of several processes of one run only the first takes it.

    The file is removed at the end. A file that a killed run left is not a lock.

    Args:
        lock_file: its folder is created if missing, and removed at the end if it is still empty.
        place: what is locked, in the user's words: `--output-dir ./run`.

    Raises:
        UserError: if another process holds the lock; the message names the process.
    """
    if not is_first():
        yield
        return
    made = _make_folders(lock_file.parent)
    stream = _take(lock_file, place)
    try:
        yield
    finally:
        if stream is not None:
            with suppress(OSError):  # the folder may be gone, full or read-only
                lock_file.unlink()  # before the lock is released, so it cannot be another run's file
            stream.close()
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # the folder is not empty any more
                break


def _make_folders(folder: Path) -> list[Path]:
    """Create a folder and missing ones above it. Returns those that were created, the deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(lock_file: Path, place: str) -> FileIO | None:
    """The locked file with this process's name in it; None if the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        try:
            stream = lock_file.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(
                f"{place}: {lock_file} cannot be written ({error.strerror}): name another folder"
            ) from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            holder = _holder(stream.read())
            stream.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{place} is in use by {holder}: wait until that run has ended or stop it, or name another one"
                ) from error
            print(
                f"warning: {lock_file.parent} is on a file system without locks ({error.strerror}): nothing stops a "
                "second run into it",
                file=sys.stderr,
            )
            return None
        if _is_file(stream, lock_file):
            break
        stream.close()  # its holder removed it after it was opened here and before it was locked
    stream.truncate(0)
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # the disk is full, but the lock holds
        stream.write(json.dumps({**me, "script": Path(sys.argv[0]).name}).encode())
    return stream


def _is_file(stream: FileIO, path: Path) -> bool:
    """Whether an open file is still the file at this path."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(content: bytes) -> str:
    """The process that a lock file names, as text."""
    try:
        found = json.loads(content)
        return f"{found['script']}, process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, TypeError, KeyError):  # the holder has not written its name yet
        return "another run"
