"""The launcher of a run (torchrun, accelerate): the command that starts the run again, and its time limit."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from pathlib import Path

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
    parent = Path(f"/proc/{os.getppid()}/cmdline")  # this file exists only on Linux
    words = parent.read_bytes().decode(errors="replace").split("\0")[:-1] if parent.is_file() else []
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
    # accelerate sets this variable from its own flags, so it is repeated only for other launchers.
    told = os.environ.get("ACCELERATE_USE_CPU") if not any("accelerate" in Path(w).name for w in words) else None
    return (f"ACCELERATE_USE_CPU={shlex.quote(told)} " if told else "") + shlex.join([*words, given])


def patience_hint() -> str | None:
    """A hint how to raise the launcher's time limit; None if there is no limit or the user has already set it."""
    if not is_elastic() or _PATIENCE in os.environ or any("shutdown" in word for word in launcher()):
        return None
    return (
        "a signal ends the run after its step and a checkpoint, for which the launcher waits 30 seconds: set "
        f"{_PATIENCE}=600 where a step takes longer"
    )
