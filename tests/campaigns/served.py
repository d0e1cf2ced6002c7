"""Kills of a run whose planner and worker are both on a real vLLM server, and kills of that server.

Two such runs: one on a server that was started by hand (`--vllm-url`), and one with a server of its own
(`--vllm-python`). Sampled tokens depend on rounding in vLLM, so the final weights are not compared.
"""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import free_port
from forks import ROOT, Forks, Run

from common.reports.jsonl import read_jsonl
from common.servers import vllm

from .kill import Subject
from .outcomes import broken_run
from .stage import Stage

GAP = 1e-3  # limit for a token's log-probability: served against computed here, both in fp32
PYTHON = ROOT / os.environ.get("VLLM_VENV", ".venv-vllm") / "bin" / "python"
GONE_SECONDS = 60  # a server's limit for noticing that its run was killed
FLAGS = ("--cpu-dtype", "float32", "--vllm-patience", "20")


class Standing:
    """A vLLM server that starts when its address is first asked for."""

    def __init__(self, stage: Stage, place: Path) -> None:
        self._stage, self._log = stage, place / "vllm.log"
        self._process: Any = None
        self._port = 0

    @property
    def url(self) -> str:
        """Its address."""
        if self._process is None:
            self._port = free_port()
            command = vllm.training_command(str(self._stage.served_model), 16, port=self._port, context=1024, cpu=True)
            with self._log.open("wb") as stream:
                environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
                self._process = vllm.start(PYTHON, command, stream.fileno(), environment)
            vllm.wait_until_ready(self._process, self._port)
        return f"http://127.0.0.1:{self._port}/v1"

    def adapters(self) -> list[str]:
        """Names of the adapters that it has loaded."""
        with urllib.request.urlopen(f"{self.url}/models") as reply:
            return [model["id"] for model in json.load(reply)["data"] if model["parent"]]

    def close(self) -> None:
        """Stop it, if it was started."""
        if self._process is not None:
            vllm.stop(self._process)


@contextmanager
def all_subjects(stage: Stage, place: Path) -> Iterator[list[Subject]]:
    """Yield the subjects; none if there is no vLLM here."""
    if not PYTHON.exists():
        print(f"no vLLM at {PYTHON}: its kills are left out", flush=True)
        yield []
        return
    server = Standing(stage, place)

    def outcome(folder: Path, left: Callable[[], list[Any]]) -> Any:
        metrics, samples = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "samples.jsonl")
        return {
            "steps": [row["step"] for row in metrics],
            "failures": [row["worker_failures"] + row["rollout_failures"] for row in metrics],
            "another policy": [row["step"] for row in metrics if not row["served_policy_gap/max"] < GAP],
            "samples": [[row["step"], row["question"]] for row in samples],
            "files": sorted(path.name for path in folder.iterdir()),
            "left": left(),
        }

    def broken_own(folder: Path) -> Iterator[str]:
        yield from broken_run(folder)
        end = time.monotonic() + GONE_SECONDS
        while processes := own_server(folder):
            if time.monotonic() > end:
                yield f"vLLM outlived its run: processes {processes}"
                return
            time.sleep(0.5)

    common: dict[str, Any] = {
        "script": "grpo_training.py", "again": lambda folder: ["--resume", "--output-dir", str(folder)], "weight": 0.4,
        "patterns": ("", r"vllm_adapters", r"/checkpoint-", r"\.jsonl"),
    }  # fmt: skip

    def started(folder: Path, *flags: str) -> list[str]:
        return [*stage.grpo(folder), "--base-model", str(stage.served_model), *FLAGS, *flags]

    port = free_port()
    try:
        yield [
            Subject("GRPO on vLLM", first=lambda folder: started(folder, "--vllm-url", server.url),
                    outcome=lambda folder: outcome(folder, server.adapters), broken=broken_run, **common),
            Subject("GRPO with its own vLLM",
                    first=lambda folder: started(folder, "--vllm-python", str(PYTHON), "--vllm-port", str(port)),
                    outcome=lambda folder: outcome(folder, lambda: own_server(folder)), broken=broken_own, **common),
        ]  # fmt: skip
    finally:
        server.close()


def own_server(folder: Path) -> list[int]:
    """Processes of a run's own server: those that print into its log."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                printed = (entry / "fd" / "1").readlink()
            except OSError:  # it has ended
                continue
            if printed == folder / "vllm.log":
                found.append(int(entry.name))
    return found


def server_killed(forks: Forks, subject: Subject) -> Callable[[Path], Run]:
    """Return a function that starts a run with a server of its own, and kills the server after the first step."""

    def meet(folder: Path) -> Run:
        run = forks.start(subject.script, *subject.first(folder))
        while not (folder / "metrics.jsonl").exists() and not run.ended(0.2):
            pass
        for process in own_server(folder):
            os.kill(process, signal.SIGKILL)
        run.wait()
        return run

    return meet
