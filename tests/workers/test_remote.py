"""The worker on a server."""

from __future__ import annotations

import json
import time

import pytest
from conftest import free_port, run_script
from misbehaving import MODELS, asks

from common.errors import UserError
from common.pipeline import PipelineExecutor, PipelineItem
from common.prompts import direct_messages
from common.rewards import RewardWeights, reward_of
from common.servers.client import Endpoint, Server
from common.settings.grpo import TrainingArgs
from common.workers.remote import ServerModel, ServerWorker, check_worker


def test_requests_are_bounded_shared_and_remembered(server):
    most, now = [0], [0]

    def fault(handler, request):
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.05)
        now[0] -= 1
        return False

    server.fault = fault
    worker = ServerWorker(Server(Endpoint(server.url, concurrency=3)), "base")
    requests = [direct_messages(f"Question {n}") for n in range(8)]
    answers = worker.generate([*requests, *requests])
    assert len(server.requests) == 8 and most[0] == 3 and answers[:8] == answers[8:]
    stats = worker.take_stats()
    assert (stats.requests, stats.generated, stats.generated_tokens) == (16, 8, 56)
    assert worker.generate(requests) == answers[:8] and len(server.requests) == 8
    sampler = ServerModel(worker.server, "base", temperature=0.7, seed=5)
    sampler.generate([requests[0]] * 3)
    assert sorted(r["seed"] for r in server.requests[-3:]) == [5, 6, 7]


def test_a_combine_does_not_wait_for_other_questions(server):
    """The quick question is combined while a subproblem of the slow one is still being solved."""
    order = []

    def fault(handler, request):
        slow = asks(request, "slow part")
        if slow:
            time.sleep(0.6)
        order.append(
            ("combine " if asks(request, "already solved") else "part ")
            + ("slow" if asks(request, "slow") else "quick")
        )
        return False

    server.fault = fault
    executor = PipelineExecutor(ServerWorker(Server(Endpoint(server.url)), "base"), None)
    plans = [json.dumps({"should_decompose": True, "subproblems": [f"the {kind} part"]}) for kind in ("slow", "quick")]
    items = [PipelineItem(plan, kind, "#### 5") for plan, kind in zip(plans, ("slow", "quick"), strict=True)]
    results = executor.execute_batch(items)
    assert [result.correct for result in results] == [True, True]
    assert order == ["part quick", "combine quick", "part slow", "combine slow"]


def test_a_worker_failure_in_training_masks_its_own_samples_only(server):
    server.fault = lambda handler, request: asks(request, "broken") and handler.error(400, "too long")
    executor = PipelineExecutor(ServerWorker(Server(Endpoint(server.url, retries=0)), "base"), None)
    direct = '{"should_decompose": false}'
    results = executor.execute_batch([PipelineItem(direct, q, "#### 5") for q in ("fine", "broken", "fine too")])
    rewards = [reward_of(result, RewardWeights()) for result in results]
    assert rewards[1] is None and rewards[0] is not None and rewards[2] is not None


def test_grpo_trains_on_a_worker_elsewhere(server, tiny_planner, questions_file, tmp_path):
    """A real run of two steps; a question that the server refuses is masked and recorded."""
    server.fault = lambda handler, request: asks(request, "9 + 4") and handler.error(400, "too long")
    done = run_script(
        "grpo_training.py", "--base-model", tiny_planner, "--dataset", str(questions_file), "--output-dir", str(tmp_path / "run"),
        "--planner-style", "short", "--worker-url", server.url, "--max-completion-length", "60", "--batch-size", "4",
        "--grad-accum", "4", "--max-steps", "2", "--temperature", "1", "--no-wandb",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"worker on {server.url}: base answers as itself beside recursive_reasoner" in done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    valid = [record for record in records if record["plan"] is not None]
    answered = [record for record in valid if "9 + 4" not in json.dumps(record["plan"]) + record["question"]]
    refused = [record for record in records if record["error"] is not None]
    assert answered and all(record["final"] == '{"final_answer": 5}' for record in answered)
    assert refused and all(record["reward"] is None and "too long" in record["error"] for record in refused)
    # The printed command serves this adapter: with its rank, a spare slot, and its base model.
    command = next(line for line in done.stdout.splitlines() if "api_server" in line)
    assert f"--lora-modules recursive_reasoner={tmp_path / 'run'}" in command and f"--model {tiny_planner}" in command
    assert "--max-lora-rank 16" in command and "--max-loras 2" in command


def test_grpo_refuses_a_worker_that_is_not_there_or_an_adapter(server, questions_file, tmp_path):
    common = [
        "--dataset",
        str(questions_file),
        "--output-dir",
        str(tmp_path / "run"),
        "--base-model",
        "packaged/SmolLM2-135M-Instruct",
    ]
    for flags, code, message in (
        (["--worker-model", "base"], 2, "add its --worker-url"),
        (["--worker-url", "localhost"], 2, "--worker-url 'localhost'"),
        (["--worker-url", server.url, "--worker-model", "recursive_reasoner"], 2, "is an adapter of base"),
        (["--worker-url", server.url], 2, "the server of --worker-url serves no base model"),
    ):
        server.models = MODELS[1:] if code == 2 and message.startswith("the server") else MODELS
        done = run_script("grpo_training.py", *common, *flags)
        assert done.returncode == code and message in done.stderr, done.stderr
        assert not (tmp_path / "run").exists()


def test_a_resumed_run_may_find_its_worker_elsewhere_but_not_become_another_run(tmp_path):
    from grpo_training import build_parser, settle

    for stored, allowed in (("http://old:1/v1", True), (None, False)):
        settings = TrainingArgs(output_dir=str(tmp_path), worker_url=stored).to_dict()
        (tmp_path / "training_config.json").write_text(json.dumps({"script": "grpo_training.py", "settings": settings}))
        options = build_parser().parse_args(
            ["--resume", "--output-dir", str(tmp_path), "--worker-url", "http://new:2/v1"]
        )
        if allowed:
            assert settle(options).worker_url == "http://new:2/v1"
        else:
            with pytest.raises(UserError, match="is no server's"):
                settle(options)


@pytest.mark.parametrize("setting", ["worker_url", "vllm_url"])
def test_a_server_that_is_not_there_at_the_start_is_wrong_input(setting, server):
    """Whichever flag names it, and whether nothing answers or something else does."""
    with pytest.raises(UserError, match="is the server up") as caught:
        check_worker(TrainingArgs(**{setting: f"http://127.0.0.1:{free_port()}/v1"}))
    assert caught.value.exit_code == 2
    server.fault = lambda handler, request: handler.reply("<html>It works!</html>", kind="text/html") or True
    with pytest.raises(UserError, match="no OpenAI-compatible server") as caught:
        check_worker(TrainingArgs(**{setting: server.url}))
    assert caught.value.exit_code == 2
