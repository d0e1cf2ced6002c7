"""The launcher of a run (torchrun, accelerate): the command that starts the run again, and its time limit."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from pathlib import Path

from common.errors import UserError
from common.processes.ranks import world_size

# Programs and modules that start a script in several processes.
_LAUNCHERS = {"torchrun", "torch.distributed.run", "accelerate", "accelerate-launch", "accelerate.commands.launch"}
_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def is_elastic() -> bool:
    """Whether torchrun supervises this process, directly or through accelerate.

    torchrun passes signals on, so Ctrl-C arrives twice: from the terminal and from torchrun. If one process ends with
    an error, torchrun sends SIGTERM to the others. After a time limit it kills those that are still running.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


@functools.cache
def launcher() -> tuple[str, ...]:
    """The launcher's command line up to the script, as words; () if plain Python started the script."""
    words = _of_parent("cmdline").decode(errors="replace").split("\0")[:-1]
    script = Path(sys.argv[0]).name
    before = next((words[:place] for place, word in enumerate(words) if Path(word).name == script), [])
    if any(Path(word).name in _LAUNCHERS for word in before):
        return tuple(before)
    if world_size() == 1:
        return ()
    here = os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))
    nodes = ("--nnodes", str(world_size() // int(here))) if int(here) < world_size() else ()
    return ("torchrun", *nodes, "--nproc_per_node", here)


def start_command(script: str) -> str:
    """The command that started this run's script, without the script's flags but with the launcher's."""
    given = sys.argv[0] if Path(sys.argv[0]).name == script else script
    words = launcher()
    if not words:
        return shlex.join([sys.executable, given])
    # `accelerate launch` sets this variable too, to "False", or to "True" because of its flag --cpu.
    told = os.environ.get("ACCELERATE_USE_CPU", "False")
    repeated = "" if told == "False" or "--cpu" in words else f"ACCELERATE_USE_CPU={shlex.quote(told)} "
    return repeated + shlex.join([*words, given])


def check_not_alone() -> None:
    """Refuse the single process that `accelerate launch` starts with fewer than two GPUs, whatever it was told.

    It leaves the others to mpirun, whose numbering of processes `common.processes.ranks` does not know.

    Raises:
        UserError: if several processes were asked for; the message says how to start them.
    """
    alone = "WORLD_SIZE" not in os.environ and any("accelerate" in Path(word).name for word in launcher())
    # accelerate sets this variable for several processes; here it must not come from the user's own environment.
    if alone and "MASTER_ADDR" in os.environ and b"\0MASTER_ADDR=" not in b"\0" + _of_parent("environ"):
        raise UserError(
            "accelerate launch was told of several processes and started one, as it does with fewer than two GPUs: "
            "use `torchrun --nproc_per_node N`, or `accelerate launch --multi_gpu --num_processes N` without --cpu, "
            "which works without a GPU too"
        )


def patience_hint() -> str | None:
    """A hint how to raise the launcher's time limit; None if there is no limit or the user has already set it."""
    if not is_elastic() or _PATIENCE in os.environ or any("shutdown" in word for word in launcher()):
        return None
    return (
        "a signal ends the run after its step and a checkpoint, for which the launcher waits 30 seconds: set "
        f"{_PATIENCE}=600 where a step takes longer"
    )


def _of_parent(what: str) -> bytes:
    """A file of /proc about the parent process; empty on systems other than Linux."""
    file = Path(f"/proc/{os.getppid()}/{what}")
    return file.read_bytes() if file.is_file() else b""
