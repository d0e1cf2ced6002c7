"""vLLM servers: their command lines, and one on this machine, started and stopped."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from common.cli import say
from common.errors import UserError
from common.runs.adapters import read_adapter_config
from common.settings.grpo import TrainingArgs
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
CONTEXT = 4096  # tokens of a prompt with its answer that a run's own server takes, or the model's most
PR_SET_PDEATHSIG = 1
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank


def port_is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def start(
    python: Path, command: Sequence[str], log: int | None = None, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[bytes]:
    """Start vLLM in a process group of its own; its output goes to `log` or the terminal.

    Its workers end with it, and on Linux it ends with this process, whatever that one dies of.
    """

    def end_with_parent() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return subprocess.Popen(
        [str(python.absolute()), *command],
        env={**os.environ, **ENVIRONMENT, **environment},
        preexec_fn=end_with_parent,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=None if log is None else subprocess.STDOUT,
        start_new_session=True,
    )


def wait_until_ready(server: subprocess.Popen[bytes] | None, port: int, seconds: float = START_SECONDS) -> None:
    """Return once the server answers; None stands for one that another process started.

    Raises:
        UserError: with exit code 1, when it ends or takes too long.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server is not None and server.poll() is not None:
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
    command = _base_command(base, needed, cpu=cpu, chat_template=chat_template)
    return [*command, "--lora-modules", f"{ADAPTER_NAME}={adapter}", "--port", str(port)]


def _base_command(base: str, rank: int, *, cpu: bool, chat_template: str | None) -> list[str]:
    """The arguments that serve a base model, and adapters up to a rank, one at a time.

    Raises:
        UserError: for a rank that vLLM does not take.
    """
    served = next((served for served in _LORA_RANKS if served >= rank), None)
    if served is None:
        raise UserError(f"LoRA rank {rank} is too high, vLLM serves up to {_LORA_RANKS[-1]}: train a smaller one")
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", base, "--enable-lora"]
    command += ["--max-lora-rank", str(served), "--max-loras", "2"]
    if cpu:
        command += ["--max-cpu-loras", "2", "--dtype", "float32", "--host", "127.0.0.1"]
    if chat_template is not None:
        command += ["--chat-template", chat_template]
    return command


def training_command(
    base: str,
    rank: int,
    *,
    port: int,
    context: int,
    cpu: bool,
    four_bit: bool = False,
    gpu_memory: float = 0.4,
    chat_template: str | None = None,
) -> list[str]:
    """The arguments that serve a training run: the base, and adapter versions that are loaded while it runs.

    Args:
        base: Hub id or folder of the base model.
        rank: of the LoRA adapter.
        context: tokens of the longest prompt with its answer.
        cpu: whether there is no GPU.
        four_bit: whether the trainer's base is quantised; the server's is then too.
        gpu_memory: share of a GPU's memory that the server takes.
        chat_template: file with one, for base models that bring none.

    Raises:
        UserError: for a rank that vLLM does not take.
    """
    command = _base_command(base, rank, cpu=cpu, chat_template=chat_template)
    # Log-probabilities at the sampling temperature, as the trainer's; no sampling defaults of the model.
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    command += ["--max-model-len", str(context), "--served-model-name", Path(base).name]
    if not cpu:
        command += ["--max-cpu-loras", "2", "--gpu-memory-utilization", f"{gpu_memory:g}", "--host", "127.0.0.1"]
        command += ["--quantization", "bitsandbytes"] if four_bit else []
    return [*command, "--port", str(port)]


@contextmanager
def serve_base(args: TrainingArgs) -> Iterator[TrainingArgs]:
    """Inside, the server that `--vllm-python` asks for runs; without it nothing is started.

    Of several processes on one machine the first starts it, and the others wait until it answers.

    Yields:
        the settings, with the server's address as `--vllm-url`.

    Raises:
        UserError: where it cannot be started.
    """
    if args.vllm_python is None:
        yield args
        return
    url = f"http://127.0.0.1:{args.vllm_port}/v1"
    served = replace(args, vllm_url=url)
    if os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1"):
        raise UserError("--vllm-python serves one machine only: start servers by hand and name them with --vllm-url")
    if os.environ.get("RANK", "0") != "0":
        wait_until_ready(None, args.vllm_port)
        yield served
        return
    python = Path(args.vllm_python)
    if not python.is_file():
        raise UserError(f"--vllm-python {python} does not exist: name the Python of an environment that has vLLM")
    if not port_is_free(args.vllm_port):
        raise UserError(f"--vllm-port {args.vllm_port} is in use: name another")
    log = Path(args.output_dir) / "vllm.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = _command_of(args, log.parent)
    say(f"starting a vLLM server, which takes a minute or more (log: {log}):\n  {shown_command(command)}")
    local = Path(_model_of(args)).is_dir()
    with log.open("wb") as stream:
        server = start(
            python,
            command,
            stream.fileno(),
            {
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                "HF_HUB_OFFLINE": "1" if local else os.environ.get("HF_HUB_OFFLINE", "0"),
            },
        )
    try:
        try:
            wait_until_ready(server, args.vllm_port)
        except UserError as error:
            raise UserError(f"{error} ({log})", exit_code=1) from error
        yield served
    finally:
        stop(server)


def _model_of(args: TrainingArgs) -> str:
    from common.models import resolve_model

    return resolve_model(args.base_model)


def _command_of(args: TrainingArgs, folder: Path) -> list[str]:
    """The command of the server that goes with a run; a chat template that it needs is written into a folder."""
    import torch
    from transformers import AutoConfig

    from common import models, prompts

    model, template = _model_of(args), None
    with models.explained(args.base_model):
        longest = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", CONTEXT)
    if models.load_tokenizer(args.base_model).chat_template == prompts.PLAIN_CHAT_TEMPLATE:
        template = folder / "vllm_chat_template.jinja"
        template.write_text(prompts.PLAIN_CHAT_TEMPLATE)
    return training_command(
        model,
        _rank_of(args),
        port=args.vllm_port,
        context=min(CONTEXT, longest),
        cpu=not torch.cuda.is_available(),
        four_bit=models.use_4bit(args),
        gpu_memory=args.vllm_gpu_memory,
        chat_template=None if template is None else str(template.absolute()),
    )


def _rank_of(args: TrainingArgs) -> int:
    """Of the adapter in training: a warm start's own."""
    return args.lora_r if args.adapter_path is None else int(read_adapter_config(args.adapter_path)["r"])


def shown_command(command: list[str]) -> str:
    """A command as text to paste into a shell."""
    return shlex.join(["python", *command])
