"""vLLM servers: build their command lines, and start and stop one on this machine."""

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
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from common.cli import say
from common.errors import UserError
from common.processes import guard
from common.processes.ranks import is_first
from common.runs.adapters import read_adapter_config
from common.settings.grpo import TrainingArgs
from common.settings.inference import ADAPTER_NAME

START_SECONDS = 600  # limit for starting; it takes minutes on a busy machine, less than one on an idle one
# No access to the Hub, and no usage statistics. 1 GB of KV cache is enough for a 135M model.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CONTEXT = 4096  # tokens of prompt and completion on a run's own server; less if the model's context is shorter
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts for --max-lora-rank


def port_is_free(port: int) -> bool:
    """Whether no program listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def start(
    python: Path, command: Sequence[str], log: int | None = None, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[bytes]:
    """Start vLLM in its own process group, below a guard that ends it (`common.processes.guard`).

    On Linux the server and its worker processes also end when this process ends, for any reason.

    Args:
        python: of an environment with vLLM.
        command: arguments of `python`.
        log: file descriptor for the output; None for the terminal.
        environment: additional environment variables.
    """

    def end_with_parent() -> None:
        if libc is not None:
            libc.prctl(guard.PR_SET_PDEATHSIG, signal.SIGTERM)

    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return subprocess.Popen(
        [sys.executable, "-I", guard.__file__, str(python.absolute()), *command],
        env={**os.environ, **ENVIRONMENT, **environment},
        preexec_fn=end_with_parent,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=None if log is None else subprocess.STDOUT,
        start_new_session=True,
    )


def wait_until_ready(server: subprocess.Popen[bytes] | None, port: int, seconds: float = START_SECONDS) -> None:
    """Wait until the server answers.

    Args:
        server: the process, or None if another process started it.
        port: of the server on this machine.
        seconds: limit.

    Raises:
        UserError: with exit code 1, if the server ends or takes too long.
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
    """End the server and all its worker processes. They are killed if they do not end after a signal."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        # Also after the server itself has ended, the next signal kills what is left of its process group.
        with suppress(subprocess.TimeoutExpired):
            server.wait(patience)


def server_command(
    base: str, adapter: Path | str, *, port: int = 8000, cpu: bool, chat_template: str | None = None
) -> list[str]:
    """Arguments of `python` that serve an adapter and its base model with vLLM.

    The command reserves one more LoRA slot than there are adapters. Otherwise vLLM's CPU backend answers base requests
    with the adapter (docs/inference.md). The rank comes from the adapter's config, rounded up to one that vLLM accepts.

    Args:
        base: Hub id or folder of the base model.
        adapter: folder of the adapter.
        port: of the server.
        cpu: whether there is no GPU; then the server uses fp32 and little memory.
        chat_template: file for a base model without a chat template of its own.

    Raises:
        UserError: if the folder holds no LoRA adapter, or the rank is too high.
    """
    config = read_adapter_config(str(adapter), "--lora-modules")
    # With rank_pattern, some layers may have a higher rank than `r`.
    needed = max([config["r"], *config.get("rank_pattern", {}).values()])
    command = _base_command(base, needed, cpu=cpu, chat_template=chat_template)
    # Clients in other folders look for the adapter's settings under the path that the server reports.
    return [*command, "--lora-modules", f"{ADAPTER_NAME}={Path(adapter).absolute()}", "--port", str(port)]


def _base_command(base: str, rank: int, *, cpu: bool, chat_template: str | None) -> list[str]:
    """Arguments that serve a base model, and one adapter at a time with at most this rank.

    Raises:
        UserError: for a rank that vLLM does not accept.
    """
    served = next((served for served in _LORA_RANKS if served >= rank), None)
    if served is None:
        raise UserError(f"LoRA rank {rank} is too high, vLLM serves up to {_LORA_RANKS[-1]}: train a smaller one")
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", base, "--enable-lora"]
    # vLLM's own default is every address of the machine, and not all of its paths require a key (docs/inference.md).
    command += ["--max-lora-rank", str(served), "--max-loras", "2", "--host", "127.0.0.1"]
    if cpu:
        command += ["--max-cpu-loras", "2", "--dtype", "float32"]
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
    """Arguments that serve a training run: the base model, and adapter versions that are loaded while it runs.

    Args:
        base: Hub id or folder of the base model.
        rank: of the LoRA adapter.
        port: of the server.
        context: tokens of the longest prompt with its completion.
        cpu: whether there is no GPU.
        four_bit: whether the trainer's base model is quantised; the server's is then quantised too.
        gpu_memory: share in [0, 1] of the GPU's memory for the server.
        chat_template: file for a base model without a chat template of its own.

    Raises:
        UserError: for a rank that vLLM does not accept.
    """
    command = _base_command(base, rank, cpu=cpu, chat_template=chat_template)
    # The server must return log-probabilities at the sampling temperature, as the trainer computes them. It must not
    # use sampling defaults of the model.
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    command += ["--max-model-len", str(context), "--served-model-name", Path(base).name]
    if not cpu:
        command += ["--max-cpu-loras", "2", "--gpu-memory-utilization", f"{gpu_memory:g}"]
        command += ["--quantization", "bitsandbytes"] if four_bit else []
    return [*command, "--port", str(port)]


@contextmanager
def serve_base(args: TrainingArgs) -> Iterator[TrainingArgs]:
    """Context manager: inside it, the server of `--vllm-python` runs; without that flag nothing is started.

    If several processes of a run are on one machine, the first starts the server and the others wait for it.

    Yields:
        The settings, with the server's address as `--vllm-url`.

    Raises:
        UserError: if the server cannot be started.
    """
    if args.vllm_python is None:
        yield args
        return
    url = f"http://127.0.0.1:{args.vllm_port}/v1"
    served = replace(args, vllm_url=url)
    if os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1"):
        raise UserError("--vllm-python serves one machine only: start servers by hand and name them with --vllm-url")
    if not is_first():
        wait_until_ready(None, args.vllm_port)
        yield served
        return
    check_own_server(args)
    log = Path(args.output_dir) / "vllm.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = _command_of(args, log.parent)
    say(f"starting a vLLM server, which takes a minute or more (log: {log}):\n  {shown_command(command)}")
    local = Path(_model_of(args)).is_dir()
    with log.open("wb") as stream:
        server = start(
            Path(args.vllm_python).absolute(),
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


def check_own_server(args: TrainingArgs) -> None:
    """Check that the server of `--vllm-python` can be started: its Python has what it needs, and its port is free.

    Raises:
        UserError: if it cannot be started.
    """
    if args.vllm_python is None or not Path(args.vllm_python).exists():
        raise UserError(
            f"--vllm-python {args.vllm_python} does not exist: name the Python of an environment that has vLLM"
        )
    no_python = UserError(
        f"--vllm-python {args.vllm_python} is no Python that runs: name that of an environment with vLLM"
    )
    if not port_is_free(args.vllm_port):
        raise UserError(f"--vllm-port {args.vllm_port} is in use: name another")
    import torch

    from common import models

    # Since 0.28 vLLM quantises with bitsandbytes only by a plugin.
    quantised = torch.cuda.is_available() and models.use_4bit(args)
    wanted = ["vllm", *(["vllm_bnb_plugin", "bitsandbytes"] if quantised else [])]
    look = "import sys; from importlib.util import find_spec; print(*(n for n in sys.argv[1:] if find_spec(n) is None))"
    try:
        done = subprocess.run(
            [Path(args.vllm_python).absolute(), "-c", look, *wanted], capture_output=True, text=True, check=False
        )
    except OSError:  # a folder, or a file that is not executable
        raise no_python from None
    if done.returncode:
        raise no_python
    if lacking := done.stdout.split():
        raise UserError(
            f"--vllm-python {args.vllm_python} lacks {', '.join(lacking)}: pip install -r requirements-vllm.txt there"
        )


def _model_of(args: TrainingArgs) -> str:
    from common.models import resolve_model

    return resolve_model(args.base_model)


def _command_of(args: TrainingArgs, folder: Path) -> list[str]:
    """Command of the server for a run. If it needs a chat template, that is written into `folder`."""
    import torch
    from transformers import AutoConfig

    from common import models, prompts

    model, template = _model_of(args), None
    with models.explained(args.base_model):
        longest = getattr(
            AutoConfig.from_pretrained(model, trust_remote_code=False), "max_position_embeddings", CONTEXT
        )
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
    """LoRA rank in training; with a warm start, that of its adapter."""
    return args.lora_r if args.adapter_path is None else int(read_adapter_config(args.adapter_path)["r"])


def shown_command(command: list[str]) -> str:
    """A command as text that can be pasted into a shell."""
    return shlex.join(["python", *command])
