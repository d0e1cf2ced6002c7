"""A real vLLM server on the CPU: which model answers, plans by JSON schema, files, benchmark, and training."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import run_script

from common.models import resolve_model
from common.problems.questions import load_questions
from common.prompts import direct_messages, planner_messages
from common.servers.client import Endpoint, Server
from common.servers.model_list import base_model
from common.servers.probe import probe
from common.servers.vllm import server_command
from common.settings.grpo import PACKAGED_MODEL
from common.workers.local import FrozenWorker
from common.workers.remote import ServerModel, ServerWorker

NAME = "SmolLM2-135M-Instruct"
SOURCE = "generated:shares?people=4&low=1&high=5"


@pytest.fixture(scope="session")
def serve(vllm_server, planner_adapter):
    """A context manager: runs a server of base and adapter with a number of LoRA slots, and gives its address."""

    @contextmanager
    def serve(slots: int) -> Iterator[str]:
        command = server_command(resolve_model(PACKAGED_MODEL), planner_adapter, cpu=True)
        for flag in ("--max-loras", "--max-cpu-loras"):
            command[command.index(flag) + 1] = str(slots)
        with vllm_server([*command, "--served-model-name", NAME, "--max-model-len", "1024"]) as address:
            yield address

    return serve


@pytest.fixture(scope="session")
def url(serve) -> Iterator[str]:
    with serve(slots=2) as address:
        yield address


def ask(url: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_script("inference_vllm.py", "--base-url", url, *flags, timeout=1800)


def test_the_probe_catches_a_server_without_a_spare_slot(serve):
    """Then this backend answers base requests with the adapter when both kinds share a batch."""
    with serve(slots=1) as contaminated:
        done = ask(contaminated, "--question", "What is 2 + 3 + 4?")
    assert done.returncode == 3, done.stderr
    assert f"requests to {NAME} are answered by recursive_reasoner" in done.stderr
    assert "--max-loras 2" in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_the_base_answers_as_the_local_worker_does_also_in_a_mixed_batch(url, smollm2):
    """While the adapter is busy, the answers equal those of training's frozen worker token by token."""
    model, tokenizer = smollm2
    server = Server(Endpoint(url))
    served = server.run(server.models())
    assert base_model(served, None, flag="--model").name == NAME
    found = server.run(probe(server, NAME, "recursive_reasoner", "short"))
    assert not found.contaminated and not found.adapter_equals_base and found.noise < 1e-3

    requests = [direct_messages(item.question, "few-shot") for item in load_questions(SOURCE, limit=6, seed=3)]
    planner = ServerModel(server, "recursive_reasoner", max_tokens=32)
    worker = ServerWorker(server, NAME, style="few-shot", max_tokens=48)

    async def mixed():
        import asyncio

        plans = [planner.answer(planner_messages(f"What is {n} + 2 + 3?", "short")) for n in range(6)]
        return await asyncio.gather(*plans, *(worker.answer(request) for request in requests))

    answers = server.run(mixed())[6:]
    local = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=48).generate(requests)
    assert answers == local  # texts, token counts and ends


def test_one_question_is_planned_by_schema_and_solved(url):
    done = ask(url, "--question", "What is 2 + 3 + 4?", "--json", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["plan_state"] == "valid" and record["decision"] == "split" and len(record["solutions"]) == 2
    assert "worker_style=few-shot" in done.stderr and "training_config.json" in done.stderr  # from the adapter's folder
    too_long = ask(url, "--question", "What is 2 + 3? " * 400, "--no-probe")
    assert too_long.returncode == 1 and "1024" in too_long.stdout  # the server's own words


def test_a_file_is_answered_and_resumed(url, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"question": item.question, "answer": item.answer} for item in load_questions(SOURCE, limit=6, seed=4)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--input", str(source), "--output", str(output), "--temperature", "0", "--no-probe")
    assert ask(url, *flags).returncode == 0
    lines = output.read_text().splitlines()
    assert [json.loads(line)["question"] for line in lines] == [row["question"] for row in rows]
    output.write_text("\n".join(lines[:4]) + "\n" + lines[4][:30])  # killed while it wrote the fifth
    again = ask(url, *flags)
    assert again.returncode == 0 and "answered before: 4 of 6 questions" in again.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["answer"] for r in found] == [json.loads(line)["answer"] for line in lines]


def test_the_benchmark_has_the_rows_of_trainings_scoreboard(url, tmp_path):
    done = ask(
        url, "--benchmark", "--samples", "10", "--dataset", SOURCE, "--max-tokens", "64", "--no-probe",
        "--output", str(tmp_path / "board"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "board" / "evaluation.json").read_text())
    assert summary["questions"] == 10
    assert list(summary["rows"]) == ["direct", "votes", "untrained planner", "trained planner"]
    assert summary["rows"]["trained planner"]["planner_tokens"] > 0
    assert all(row["worker_failures"] == 0 for row in summary["rows"].values())
    assert "plans of the trained planner: " in done.stdout


def test_grpo_trains_with_the_servers_base_as_worker(url, tiny_planner, questions_file, tmp_path):
    done = run_script(
        "grpo_training.py", "--base-model", tiny_planner, "--dataset", str(questions_file), "--output-dir", str(tmp_path / "run"),
        "--planner-style", "short", "--worker-style", "few-shot", "--worker-max-tokens", "16", "--worker-url", url,
        "--max-completion-length", "60", "--batch-size", "4", "--grad-accum", "4", "--max-steps", "1", "--temperature", "1", "--no-wandb",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    # The tiny planner cannot add, so correct sums come from SmolLM2 on the server.
    assert any("=" in solution for record in records for solution in record["solutions"]) and not any(
        r["error"] for r in records
    )
