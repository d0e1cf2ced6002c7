"""What started the processes of a run: the command that does so again, and its patience when they must stop."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from pathlib import Path

from common.processes.ranks import world_size

# Programs and modules that start several processes of a script.
_LAUNCHERS = {"torchrun", "torch.distributed.run", "accelerate", "accelerate-launch", "accelerate.commands.launch"}
_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def is_elastic() -> bool:
    """Whether torchrun, or accelerate through it, watches over this process.

    It passes signals on, so that Ctrl-C comes twice (from the terminal too); when one process ends with an error it
    ends the others with SIGTERM; and it kills what has not ended in time.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


@functools.cache
def launcher() -> tuple[str, ...]:
    """The words that started the launcher, up to the script; () for plain Python."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")  # Linux alone tells
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
    """How this run's script was started, without its flags: as Python runs it, or with the launcher's own words."""
    given = sys.argv[0] if Path(sys.argv[0]).name == script else script
    words = launcher()
    if not words:
        return shlex.join([sys.executable, given])
    # accelerate sets the variable itself, from its own flags.
    told = os.environ.get("ACCELERATE_USE_CPU") if not any("accelerate" in Path(w).name for w in words) else None
    return (f"ACCELERATE_USE_CPU={shlex.quote(told)} " if told else "") + shlex.join([*words, given])


def patience_hint() -> str | None:
    """How to give a step the time to end when the run is told to stop; None where nobody kills it or that was done."""
    if not is_elastic() or _PATIENCE in os.environ or any("shutdown" in word for word in launcher()):
        return None
    return (
        "a signal ends the run after its step and a checkpoint, for which the launcher waits 30 seconds: set "
        f"{_PATIENCE}=600 where a step takes longer"
    )
