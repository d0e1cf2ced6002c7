"""A vLLM server on this machine: its command line, and starting and stopping it."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.runs.adapters import read_adapter_config
from common.settings.inference import ADAPTER_NAME

START_SECONDS = 600  # a busy machine takes minutes, an idle one less than one
# No model hub, no usage statistics; 1 GB of keys and values is plenty for a 135M model.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank


def port_is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def start(python: Path, command: Sequence[str], log: int | None = None) -> subprocess.Popen[bytes]:
    """Start vLLM in a process group of its own, whose workers end with it; its output goes to `log` or the terminal."""
    return subprocess.Popen(
        [str(python.absolute()), *command],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=None if log is None else subprocess.STDOUT,
        start_new_session=True,
    )


def wait_until_ready(server: subprocess.Popen[bytes], port: int, seconds: float = START_SECONDS) -> None:
    """Return once the server answers.

    Raises:
        UserError: with exit code 1, when it ends or takes too long.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise UserError(f"vLLM ended with code {server.returncode}: its output says why", exit_code=1)
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except (OSError, urllib.error.URLError):
            time.sleep(1)
        else:
            return
    raise UserError(f"vLLM did not answer within {seconds:g} s: its output says why", exit_code=1)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and all its workers, by force where asking is not enough."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        try:
            server.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if number is signal.SIGTERM:
            continue  # the parent is gone; whatever it left behind is not worth waiting for


def server_command(
    base: str, adapter: Path | str, *, port: int = 8000, cpu: bool, chat_template: str | None = None
) -> list[str]:
    """The arguments of `python` that serve an adapter and its base with vLLM.

    A slot more than there are adapters, because vLLM's CPU backend otherwise answers base requests with the
    adapter (docs/inference.md); the rank from the adapter's config, rounded up to one that vLLM takes.

    Args:
        base: Hub id or folder of the base model.
        adapter: its folder.
        cpu: whether there is no GPU: single precision, little memory, this machine only.
        chat_template: file with one, for base models that bring none.

    Raises:
        UserError: when the folder holds no LoRA adapter, or one of too high a rank.
    """
    config = read_adapter_config(str(adapter), "--lora-modules")
    # With rank_pattern some layers may have a higher rank than `r`.
    needed = max([config["r"], *config.get("rank_pattern", {}).values()])
    rank = next((rank for rank in _LORA_RANKS if rank >= needed), None)
    if rank is None:
        raise UserError(f"{adapter} has LoRA rank {needed}, vLLM serves up to {_LORA_RANKS[-1]}: train a smaller one")
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", base, "--enable-lora"]
    command += ["--max-lora-rank", str(rank), "--max-loras", "2"]
    if cpu:
        command += ["--max-cpu-loras", "2", "--dtype", "float32", "--host", "127.0.0.1"]
    if chat_template is not None:
        command += ["--chat-template", chat_template]
    return [*command, "--lora-modules", f"{ADAPTER_NAME}={adapter}", "--port", str(port)]


def shown_command(command: list[str]) -> str:
    """A command as text to paste into a shell."""
    return shlex.join(["python", *command])
