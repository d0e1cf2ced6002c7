"""GRPO with planner and worker on a real vLLM server: the right model answers, and a wrong one stops the run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, free_port, run_script
from launched import RANKS, torchrun
from safetensors.torch import load_file

from common.models import resolve_model
from common.plans import Plan
from common.prompts import direct_messages, subproblem_messages
from common.reports.jsonl import read_jsonl
from common.servers.vllm import port_is_free, training_command
from common.settings.grpo import PACKAGED_MODEL
from common.workers.local import FrozenWorker

STEPS = 5


class RunningServer:
    """A vLLM server as `--vllm-python` starts it; it can be killed and started again at the same address."""

    def __init__(self, vllm_server) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._serve = vllm_server
        self._running = ExitStack()

    def start(self) -> None:
        command = training_command(resolve_model(PACKAGED_MODEL), 16, port=self.port, context=1024, cpu=True)
        environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        self._running.enter_context(self._serve(command, environment, self.port))

    def stop(self) -> None:
        self._running.close()


@pytest.fixture(scope="module")
def served(vllm_server) -> Iterator[RunningServer]:
    server = RunningServer(vllm_server)
    server.start()
    yield server
    server.stop()


def command(url: str, adapter: str, questions: Path, folder: Path, *flags: str) -> list[str]:
    """The command of a run of a few steps whose adapter changes a lot in each."""
    return [
        "--base-model", PACKAGED_MODEL, "--adapter-path", adapter, "--dataset", str(questions), "--output-dir", str(folder),
        "--planner-style", "short", "--worker-style", "few-shot", "--worker-max-tokens", "8", "--max-completion-length", "48",
        "--batch-size", "4", "--grad-accum", "1", "--num-generations", "4", "--temperature", "1.8", "--max-steps", str(STEPS),
        "--lr", "1e-3", "--lr-schedule", "constant", "--save-steps", "100", "--no-wandb", "--cpu-dtype", "float32",
        "--vllm-url", url, *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(served, planner_adapter, questions_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "run"
    done = run_script("grpo_training.py", *command(served.url, planner_adapter, questions_file, folder))
    assert done.returncode == 0, done.stderr
    return folder


def loaded(url: str) -> list[str]:
    """Names of the adapters on a server."""
    with urllib.request.urlopen(f"{url}/models") as reply:
        return [model["id"] for model in json.load(reply)["data"] if model["parent"]]


def test_the_adapter_in_training_wrote_every_completion(run, served, planner_adapter):
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert 0 <= line["served_policy_gap/mean"] <= line["served_policy_gap/max"] < 1e-3
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-2)
        assert line["worker_failures"] == line["rollout_failures"] == 0
    before, after = (load_file(Path(f) / "adapter_model.safetensors") for f in (planner_adapter, run))
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 1e-3, "nothing moved"
    assert not loaded(served.url) and not (run / "vllm_adapters").exists(), "a run leaves nothing behind"


def test_the_worker_on_the_server_answers_as_the_frozen_worker_here(run, smollm2):
    """Also after five versions of the adapter were loaded, with the last very different from the first."""
    model, tokenizer = smollm2
    samples = [sample for sample in read_jsonl(run / "samples.jsonl") if sample["plan"]]
    local = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=8)
    compared = 0
    for sample in samples[:3] + samples[-3:]:
        plan = Plan(sample["plan"]["should_decompose"], tuple(sample["plan"]["subproblems"]))
        question = sample["question"]
        asked = [subproblem_messages(part, question, "few-shot") for part in plan.subproblems]
        told = sample["solutions"] if asked else [sample["final"]]
        assert [a.text for a in local.generate(asked or [direct_messages(question, "few-shot")])] == told
        compared += len(told)
    assert compared > 6


class Forwarding(BaseHTTPRequestHandler):
    """Hands requests on to the server at `upstream`, and its replies back."""

    protocol_version = "HTTP/1.1"
    upstream = ""

    def do_GET(self):
        self.forward(None)

    def do_POST(self):
        self.post(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def post(self, body):
        self.forward(json.dumps(body).encode())

    def forward(self, body):
        address = self.upstream.removesuffix("/v1") + self.path
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                self.reply(reply.status, reply.read())
        except urllib.error.HTTPError as error:
            self.reply(error.code, error.read())

    def reply(self, status, data):
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if data[:1] in b'{["' else "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def proxy(handler: type[Forwarding], url: str) -> Iterator[str]:
    """The address of a server before another one."""
    handler.upstream = url
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/v1"
        running.shutdown()


@contextmanager
def sabotaged(url: str, after: int, answer_as: str | None) -> Iterator[str]:
    """A proxy that passes on `after` adapters. It only pretends to load the next: an older one or the base answers."""
    known: list[str] = []

    class Pretending(Forwarding):
        def post(self, body):
            if self.path.endswith("load_lora_adapter") and body["lora_name"].startswith("planner-"):
                if self.path.endswith("/load_lora_adapter") and len(known) < after:
                    known.append(body["lora_name"])
                elif body["lora_name"] not in known[:-1]:
                    return self.reply(200, b'"ok"')
            elif self.path.endswith("/v1/completions") and len(known) == after and body["model"] != known[-1]:
                body["model"] = answer_as or known[-1] if body["model"].startswith("planner-") else body["model"]
            return super().post(body)

    with proxy(Pretending, url) as address:
        yield address


def test_a_swap_that_did_not_happen_stops_the_run_at_once_and_it_goes_on_from_there(
    run, served, planner_adapter, questions_file, tmp_path
):
    """Version 2 answers in step 3. Resumed with a correct server, the run ends like one that never stopped."""
    folder = tmp_path / "run"
    with sabotaged(served.url, after=2, answer_as=None) as url:
        flags = command(url, planner_adapter, questions_file, folder, "--max-steps", "3")
        done = run_script("grpo_training.py", *flags)
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "the completions of step 3 are not the trained adapter's" in line and f"{folder} --resume" in line
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2], "the third step was not done"
    done = run_script("grpo_training.py", "--output-dir", str(folder), "--resume", "--vllm-url", served.url)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3]
    whole, resumed = ([row["completion"] for row in read_jsonl(f / "samples.jsonl")] for f in (run, folder))
    same = sum(a == b for a, b in zip(whole, resumed, strict=False))
    assert len(resumed) == 12 and same > 9, "seeds are the same; only rounding may turn a token"


def test_the_base_in_the_adapters_place_stops_the_run(served, planner_adapter, questions_file, tmp_path):
    folder = tmp_path / "run"
    base = Path(resolve_model(PACKAGED_MODEL)).name
    with sabotaged(served.url, after=1, answer_as=base) as url:
        done = run_script(
            "grpo_training.py", *command(url, planner_adapter, questions_file, folder, "--max-steps", "2")
        )
    assert done.returncode == 3 and "step 2 are not the trained adapter's" in done.stderr, done.stderr


def test_a_server_that_is_killed_and_started_again_costs_no_sample(served, planner_adapter, questions_file, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "grpo_training.py"), *command(served.url, planner_adapter, questions_file, folder)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_for(process, folder / "metrics.jsonl")
    served.stop()
    served.start()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    lines = read_jsonl(folder / "metrics.jsonl")
    assert len(lines) == STEPS and all(line["served_policy_gap/max"] < 1e-3 for line in lines)
    assert not any(line["rollout_failures"] for line in lines)


def test_two_servers_share_the_prompts(served, vllm_server, planner_adapter, questions_file, tmp_path):
    second = RunningServer(vllm_server)
    second.start()
    try:
        flags = command(
            f"{served.url},{second.url}",
            planner_adapter,
            questions_file,
            tmp_path / "run",
            "--max-steps",
            "2",
            "--batch-size",
            "8",
        )
        done = run_script("grpo_training.py", *flags)
        assert done.returncode == 0, done.stderr
        assert all(line["served_policy_gap/max"] < 1e-3 for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"))
        for url in (served.url, second.url):
            with urllib.request.urlopen(url[: -len("v1")] + "metrics") as reply:
                counted = [
                    row for row in reply.read().decode().splitlines() if row.startswith("vllm:request_success_total")
                ]
            assert sum(float(row.split()[-1]) for row in counted) > 0
    finally:
        second.stop()


def test_two_ranks_on_one_server_never_ask_planner_and_worker_together(
    served, planner_adapter, questions_file, tmp_path
):
    """One planner request of each wave is held back: the other rank has its plans long before, and must wait."""
    spans: list[tuple[bool, float, float]] = []  # of requests: whether to the planner, start, end
    waves: set[str] = set()

    class Watching(Forwarding):
        def post(self, body):
            model, started = body.get("model", ""), time.monotonic()
            if model.startswith("planner-") and model not in waves:
                waves.add(model)
                time.sleep(3)
            super().post(body)
            if model:
                spans.append((model.startswith("planner-"), started, time.monotonic()))

    folder, steps = tmp_path / "run", 2
    with proxy(Watching, served.url) as url:
        done = torchrun(*command(url, planner_adapter, questions_file, folder, "--max-steps", str(steps)))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and len(waves) == steps
    for line in lines:
        assert 0 < line["served_policy_gap/max"] < 1e-3 and line["rollout_failures"] == line["worker_failures"] == 0
    assert len(read_jsonl(folder / "samples.jsonl")) == steps * RANKS * 4
    planner, worker = ([span[1:] for span in spans if span[0] == kind] for kind in (True, False))
    assert len(planner) == steps * RANKS * 4 and worker
    at_once = max(sum(start <= moment < end for start, end in planner) for moment, _ in planner)
    assert at_once > 4, "both ranks' prompts are asked together"
    together = [(a, b) for a in planner for b in worker if a[0] < b[1] and b[0] < a[1]]
    assert not together, "the server answers the worker wrongly while it has planner requests (docs/training.md)"
    assert not loaded(served.url)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_the_runs_own_server_ends_with_it_also_when_it_is_killed(
    vllm_python, planner_adapter, questions_file, tmp_path
):
    folder, port = tmp_path / "run", free_port()
    flags = command(
        "", planner_adapter, questions_file, folder, "--vllm-port", str(port), "--vllm-python", str(vllm_python)
    )
    del flags[flags.index("--vllm-url") : flags.index("--vllm-url") + 2]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "grpo_training.py"), *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for(process, folder / "metrics.jsonl")
    assert read_jsonl(folder / "metrics.jsonl")[0]["served_policy_gap/max"] < 1e-3
    process.send_signal(signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 60
    while not port_is_free(port):
        assert time.monotonic() < end, "the server outlived the run"
        time.sleep(0.5)


def wait_for(process: subprocess.Popen, path: Path) -> None:
    """Wait until a running script has written a file."""
    end = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.2)
