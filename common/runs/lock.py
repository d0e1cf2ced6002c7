"""One run per output folder: a lock that the kernel keeps, so that neither a crash nor a reboot leaves it behind.

`flock` on a file, and not the `filelock` package: where a file system has no locks that falls back on a marker file,
which a killed run would leave behind, and the holder's name could not stand in the locked file itself.

On NFS Linux asks the server for the lock (NFSv4, or v3 with lockd), so it holds between machines too. A share that
is mounted with `nolock` or `local_lock=flock` knows the runs of the own machine only.
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

LOCK_FILE = ".run.lock"


@contextmanager
def only_run(lock_file: Path, place: str) -> Iterator[None]:
    """Hold a folder's lock; of several processes of one run the first one alone does.

    The file is removed at the end; one that a killed run has left is no lock.

    Args:
        lock_file: its folder is made where it does not exist, and removed again if nothing came into it.
        place: what is locked, as the user names it: `--output-dir ./run`.

    Raises:
        UserError: while another process holds it, with that process.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    made = _make_folders(lock_file.parent)
    stream = _take(lock_file, place)
    try:
        yield
    finally:
        if stream is not None:
            with suppress(OSError):  # the folder may have gone away meanwhile, or be full or read-only
                lock_file.unlink()  # while it is held: nobody else's file
            stream.close()
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # something came into it
                break


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder with those above it; returns those that were made, the deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(lock_file: Path, place: str) -> FileIO | None:
    """The locked file, with this process named in it; None where the file system has no locks."""
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
        stream.close()  # its holder removed it between our opening and locking it
    stream.truncate(0)
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # a full disk: locked all the same
        stream.write(json.dumps({**me, "script": Path(sys.argv[0]).name}).encode())
    return stream


def _is_file(stream: FileIO, path: Path) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(content: bytes) -> str:
    """The process that a lock file names."""
    try:
        found = json.loads(content)
        return f"{found['script']}, process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, TypeError, KeyError):  # it has only just taken the lock
        return "another run"
