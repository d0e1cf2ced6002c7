"""Runs of the scripts, forked from an interpreter that has imported torch, transformers, TRL and PEFT once.

The script itself runs: its file as `__main__`, with its own flags, messages and exit codes. Only the imports are
shared, so a run, or killing a run, takes only seconds. `Forks` belongs to the process of the tests or of a campaign.
This file, run as a program, is the interpreter that forks.

A run may have a trigger. Changes of its output folder are numbered: a file opened for writing, or a file or folder
made, moved or removed. At one of them the run ends itself with SIGKILL. Or it lets the kernel end it in the middle of
the next larger write.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "transformers.trainer", "datasets", "peft",
    "trl.trainer.grpo_trainer", "trl.trainer.sft_trainer", "sentence_transformers", "matplotlib.pyplot",
    "matplotlib.backends.backend_agg", "openai", "httpx", "huggingface_hub", "tqdm", "scipy.stats",
)  # fmt: skip
SECONDS = 900  # longer than any run of a campaign takes on a busy core


@dataclass(frozen=True)
class Trigger:
    """The moment at which a run ends itself.

    Attributes:
        folder: changes in this folder count.
        pattern: regular expression for the changes that count, searched in "KIND PATH"; "" for all.
        number: of the change, from 1; 0 for never: the changes are only logged.
        room: None ends the run at once. With a number, files may then grow by at most this many bytes. The kernel ends
            the run in the middle of the first write beyond that (SIGXFSZ ends a process by default).
        fill: a file that grows at that change until its disk is full; the run then continues.
        log: file to which each change is written as one line.
    """

    folder: Path
    pattern: str = ""
    number: int = 0
    room: int | None = None
    fill: Path | None = None
    log: Path | None = None


@dataclass
class Run:
    """One or more processes of a script."""

    pids: list[int]
    printed: Path
    errors: Path
    _forks: Forks
    codes: dict[int, int] = field(default_factory=dict)

    def kill(self, number: int = signal.SIGKILL, which: Sequence[int] | None = None) -> None:
        """Send a signal to the processes and to all processes that they started."""
        for pid in self.pids if which is None else which:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for the end. Returns the first exit code that is not 0, else 0; negative for a signal.

        Raises:
            TimeoutError: after `seconds`; the processes are killed.
        """
        deadline = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            reply = self._forks.reply(deadline - time.monotonic())
            if reply is None:
                self.kill()
                if not self.ended(60):
                    raise RuntimeError(f"a killed run does not end: {self.tail()}")
                raise TimeoutError(f"a run took more than {seconds:.0f} s: {self.tail()}")
            self.codes[reply["pid"]] = reply["code"]
        return next((self.codes[pid] for pid in self.pids if self.codes[pid] != 0), 0)

    def ended(self, seconds: float) -> bool:
        """Whether all processes end within `seconds`."""
        deadline = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            reply = self._forks.reply(deadline - time.monotonic())
            if reply is None:
                return False
            self.codes[reply["pid"]] = reply["code"]
        return True

    def text(self) -> str:
        """Everything that the run has printed."""
        return self.printed.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        """The end of the printed text."""
        return self.text()[-2500:]

    def left(self) -> list[int]:
        """Processes of the run's sessions that are still alive."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) in self.pids and fields[0] not in "ZX":
                        found.append(int(entry.name))
        return found


class Forks:
    """The interpreter with the imports already done. Use it as a context manager.

    Args:
        logs: folder for the printed texts of the runs.
        env: additional environment variables of all runs. Libraries read some when they are imported, so what a run adds
            in `start` comes too late for those.
        wandb: whether runs may import wandb; else it is missing, as with --no-wandb. TRL looks for it when imported.
    """

    def __init__(self, logs: Path, env: dict[str, str], wandb: bool = False) -> None:
        self._logs = logs
        self._env = env
        self._first = ("wandb",) if wandb else ()
        self._number = 0
        self._read = b""
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Forks:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *self._first, *PRELOADED], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **self._env},
        )  # fmt: skip
        ready = self.reply(SECONDS)
        if ready is None:
            raise TimeoutError("the interpreter that forks did not start")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def start(
        self,
        script: str,
        *flags: str,
        trigger: Trigger | None = None,
        env: dict[str, str] | None = None,
        limits: dict[str, int] | None = None,
        clock: float = 0.0,
        privileged: bool = True,
        group: Path | None = None,
        ranks: int = 1,
        apart: bool = False,
    ) -> Run:
        """Fork a run of a script.

        Args:
            script: file name of an entry script.
            flags: of its command line.
            trigger: the moment at which it ends itself.
            env: additional environment variables.
            limits: resource limits, by the names of the `resource` module. A memory limit is in addition to the memory
                that the imports already use.
            clock: seconds by which `time.time` is set back during the run.
            privileged: whether root may write files that permissions protect.
            group: `cgroup.procs` of the cgroup that it joins.
            ranks: number of processes. They find each other as under `torchrun`.
            apart: what they print on stderr goes to a file of its own, `Run.errors`.
        """
        self._number += 1
        printed = self._logs / f"{self._number:04d}-{script.removesuffix('.py')}.log"
        errors = printed.with_suffix(".errors") if apart else printed
        port = 20_000 + (os.getpid() * 31 + self._number) % 20_000
        pids = []
        for rank in range(ranks):
            own = {} if ranks == 1 else {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
            armed = None if trigger is None or rank > 0 else {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(trigger).items()
            }  # fmt: skip
            order = {
                "script": script, "flags": flags, "env": {**(env or {}), **own}, "printed": str(printed),
                "errors": str(errors), "folder": str(Path.cwd()), "limits": limits or {}, "clock": clock,
                "privileged": privileged, "trigger": armed,
                "group": None if group is None else str(group),
            }  # fmt: skip
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            reply = self.reply(SECONDS)
            assert reply is not None, "the interpreter that forks is gone"
            pids.append(reply["started"])
        return Run(pids, printed, errors, self)

    def reply(self, seconds: float) -> dict[str, Any] | None:
        """The interpreter's next message; None after `seconds` without one."""
        assert self._process.stdout is not None
        number = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._read:
            if not select.select([number], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            chunk = os.read(number, 65536)
            if not chunk:
                raise RuntimeError("the interpreter that forks has ended")
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


# ------------------------------------------------------------------------------------- the interpreter that forks


def serve() -> None:
    """Fork a run for every order on stdin. Report every start and end on stdout."""
    import gc
    import importlib

    orders, replies = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # texts that libraries print during import must not mix with the replies
    if "wandb" not in sys.argv:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every run's collections go through all imported objects, and copy their pages
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    os.write(replies, b'{"ready": true}\n')
    buffer, started = b"", set[int]()
    while True:
        ready = select.select([orders, wake_read], [], [])[0]
        if wake_read in ready:
            os.read(wake_read, 4096)
            _tell_ended(replies, started)
        if orders not in ready:
            continue
        chunk = os.read(orders, 65536)
        if not chunk:
            for pid in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            return
        buffer += chunk
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number in (orders, replies, wake_read, wake_write):
                    os.close(number)
                _run(json.loads(line))
                return
            with contextlib.suppress(OSError):  # the child may have done it already, or have ended
                os.setpgid(pid, pid)
            started.add(pid)
            os.write(replies, json.dumps({"started": pid}).encode() + b"\n")


def _tell_ended(replies: int, started: set[int]) -> None:
    for pid in list(started):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            started.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            os.write(replies, json.dumps({"pid": pid, "code": code}).encode() + b"\n")


def _run(order: dict[str, Any]) -> None:
    """Run the script in this process."""
    with contextlib.suppress(PermissionError):  # the parent has already made it a group leader
        os.setsid()
    for number, name in ((1, "printed"), (2, "errors")):
        stream = os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(order["folder"])
    os.environ.update(order["env"])
    for name, value in order["limits"].items():
        kind = getattr(resource, name)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(kind, (value + (held if name == "RLIMIT_AS" else 0), resource.getrlimit(kind)[1]))
    if order["group"] is not None:
        Path(order["group"]).write_text(str(os.getpid()))
    if order["clock"]:
        _set_back(order["clock"])
    if not order["privileged"]:
        _obey_permissions()
    # Where a run hangs is then in its printed text, before it is given up.
    faulthandler.dump_traceback_later(0.8 * SECONDS)
    path = ROOT / order["script"]
    sys.argv = [str(path), *order["flags"]]
    sys.path[0] = str(ROOT)
    if order["trigger"] is not None:
        paths = {name: Path(order["trigger"][name]) for name in ("folder", "fill", "log") if order["trigger"][name]}
        _arm(Trigger(**{**order["trigger"], **paths}))
    runpy.run_path(str(path), run_name="__main__")


def _arm(trigger: Trigger) -> None:
    """Watch this process's changes in a folder with an audit hook. It runs before a change, and cannot be removed."""
    folder, seen = str(trigger.folder), 0
    log = None if trigger.log is None else os.open(trigger.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    wanted = re.compile(trigger.pattern)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in _CHANGES:
            return
        path = args[1] if event == "os.rename" else args[0]
        if not isinstance(path, (str, bytes, os.PathLike)) or (event == "open" and not args[2] & _WRITING):
            return
        name = os.fsdecode(path)
        if not name.startswith(folder) or (event == "os.mkdir" and Path(name).exists()):
            return
        change = f"{event} {name[len(folder) :]}"
        if not wanted.search(change):
            return
        seen += 1
        if log is not None:
            os.write(log, change.encode() + b"\n")
        if seen != trigger.number:
            return
        if trigger.fill is not None:
            _fill(trigger.fill)
            return
        if trigger.room is None:
            os.kill(os.getpid(), signal.SIGKILL)
        size = Path(name).stat().st_size if event == "open" and Path(name).is_file() else 0
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores this signal by default
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + (trigger.room or 0), resource.RLIM_INFINITY))

    sys.addaudithook(hook)


def _fill(path: Path) -> None:
    """Grow a file until its disk is full."""
    with path.open("ab", buffering=0) as stream:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while stream.write(b"0" * size) == size:
                    pass


def _obey_permissions() -> None:
    """Drop root's right to ignore file permissions (capset(2): CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, for two groups of capabilities
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for place in range(3):
        sets[place] &= ~0b110
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _set_back(seconds: float) -> None:
    """Set the clock of this process back by `seconds`, from its thousandth call on."""
    real, calls = time.time, 0

    def late() -> float:
        nonlocal calls
        calls += 1
        return real() - (seconds if calls > 1000 else 0)

    time.time = late


_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

if __name__ == "__main__":
    serve()
