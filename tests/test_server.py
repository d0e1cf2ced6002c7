"""Faults of a server, on real HTTP: each is one clear line with the right exit code, and spares its neighbours."""

from __future__ import annotations

import json
import socket
import time

import pytest
from conftest import ask, failure, run_script
from misbehaving import MODELS, asks, hang

import inference_vllm
from common.args import TrainingArgs
from common.errors import UserError
from common.pipeline import PipelineExecutor, PipelineItem
from common.prompts import direct_messages
from common.rewards import RewardWeights, reward_of
from common.server import Endpoint, Server, ServerModel, ServerWorker
from common.serving import ServingArgs, server_command, shown_command


def test_one_question_is_planned_split_solved_and_combined(server, capsys):
    assert ask(server, "--json", "--temperature", "0.3") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["decision"], record["plan_state"], record["answer"]) == ("split", "valid", "5")
    assert record["subproblems"] == ["What is 2 + 3?", "What is 4 + 1?"]
    assert (record["planner_tokens"], record["worker_tokens"]) == (7, 21)
    planner = [r for r in server.requests if "response_format" in r]
    worker = [r for r in server.requests if r["model"] == "base" and "logprobs" not in r]
    assert [r["temperature"] for r in planner] == [0.3]
    assert [r["temperature"] for r in worker] == [0.0] * 3
    assert planner[0]["response_format"]["json_schema"]["schema"]["required"][0] == "should_decompose"


def test_documented_defaults():
    args = ServingArgs()
    found = (args.base_url, args.model, args.lora_adapter, args.max_tokens, args.temperature)
    assert found == ("http://localhost:8000/v1", None, "recursive_reasoner", 512, 0.7)


def test_nobody_answers(capfd):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    done = run_script(
        "inference_vllm.py", "--base-url", f"http://127.0.0.1:{port}/v1", "--question", "Q", "--retries", "0"
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f":{port}/v1" in line and "is the server up" in line


@pytest.mark.parametrize(
    ("body", "kind"),
    [("<html>It works!</html>", "text/html"), ("{", "application/json"), ('{"data": 3}', "application/json")],
)
def test_something_else_answers(server, body, kind):
    server.fault = lambda handler, request: handler.reply(body, kind=kind) or True
    code, line = failure(server)
    assert code == 1 and "no OpenAI-compatible server" in line


def test_a_wrong_path(server):
    server.fault = lambda handler, request: handler.error(404, "Not Found")
    code, line = failure(server)
    assert code == 2 and "/v1" in line


def test_a_wrong_key_is_told_and_never_shown(server, monkeypatch):
    server.fault = lambda handler, request: handler.error(401, f"bad {handler.headers['Authorization']}")
    for flags, env in ((["--api-key", "sk-secret-1"], None), ([], "sk-secret-2")):
        monkeypatch.setenv("OPENAI_API_KEY", env) if env else monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        code, line = failure(server, *flags)
        assert code == 2 and "refuses the key" in line and "secret" not in line
    server.fault = lambda handler, request: handler.error(400, f"{handler.headers['Authorization']} is over its limit")
    code, line = failure(server)
    assert "over its limit" in line and "secret" not in line
    assert "sk-secret" not in repr(ServingArgs(api_key="sk-secret-3"))


def test_who_is_not_served_and_who_belongs_to_whom(server):
    assert failure(server, "--lora-adapter", "other") == (
        2,
        "--lora-adapter other is not served, found base, recursive_reasoner: start the server with --enable-lora "
        "--lora-modules other=FOLDER, or name another",
    )
    code, line = failure(server, "--model", "gpt")
    assert code == 2 and "--model gpt is not served there: base, recursive_reasoner" in line
    code, line = failure(server, "--worker-model", "recursive_reasoner")
    assert code == 2 and "is an adapter of base" in line
    other = {**MODELS[0], "id": "second", "root": "/other"}
    server.models = [*MODELS, other]
    code, line = failure(server, "--model", "second")
    assert code == 2 and "is an adapter of base, not of --model second" in line
    server.models = [*MODELS, {**other, "root": "/m"}]  # the same model by another name
    assert ask(server, "--model", "second", "--json") == 0


def test_an_adapter_that_equals_the_base_is_refused(server, capsys):
    server.same_as_base = True
    code, line = failure(server)
    assert code == 3 and "answers exactly like base" in line
    assert ask(server, "--no-probe", "--json") == 0


def test_a_contaminated_base_is_refused_with_the_remedy(server):
    """The adapter answers for the base while adapter requests are in flight, as vLLM's CPU backend does."""
    busy = []

    def fault(handler, request):
        if request.get("model") == "recursive_reasoner":
            busy.append(1)
            time.sleep(0.05)
            handler.reply(server.completion(request))
            busy.pop()
            return True
        if request and busy:
            time.sleep(0.01)
            handler.reply({**server.completion({**request, "model": "recursive_reasoner"})})
            return True
        return False

    server.fault = fault
    code, line = failure(server)
    assert code == 3 and "--max-loras 2" in line


def test_a_server_that_knows_no_json_schema_and_no_system_message_is_asked_without(server, capsys):
    def fault(handler, request):
        if "response_format" in request:
            return handler.error(400, "response_format is not supported")
        if request and request["messages"][0]["role"] == "system":
            return handler.error(400, "System role not supported")
        if request.get("model") == "recursive_reasoner" and "logprobs" not in request:
            handler.reply(server.completion(request, 'Sure: {"should_decompose": false, "subproblems": []}'))
            return True
        return False

    server.fault = fault
    assert ask(server, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["plan_state"], record["decision"], record["answer"]) == ("repaired", "direct", "5")
    assert (
        "Split the problem" in server.requests[-2]["messages"][0]["content"]
        or server.requests[-2]["messages"][0]["role"] == "user"
    )


def test_an_invalid_plan_is_solved_directly_and_says_so(server, capsys):
    def fault(handler, request):
        if request.get("model") == "recursive_reasoner" and "logprobs" not in request:
            handler.reply(server.completion(request, "I would rather not."))
            return True
        return False

    server.fault = fault
    assert ask(server) == 0
    shown = capsys.readouterr().out
    assert "no valid plan, so: solve directly" in shown and "I would rather not." in shown


def test_trouble_that_passes_is_retried_and_trouble_that_stays_is_told(server, capsys):
    served = []

    def fault(handler, request):
        if not asks(request, "How many?"):
            return False
        served.append(1)
        if len(served) == 1:
            return handler.error(503, "loading", Retry_After="0")
        if len(served) == 2:
            handler.reply(server.completion(request), cut=40)  # the connection breaks in the middle of the reply
            return True
        return False

    server.fault = fault
    assert ask(server, "--retries", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "5"

    server.fault = lambda handler, request: (
        asks(request, "How many?") and (handler.reply(server.completion(request), cut=40) or True)
    )
    code, line = failure(server, "--json")
    assert code == 1 and "no answer" in line
    server.fault = hang(2)
    code, line = failure(server, "--timeout", "0.3", "--no-probe", "--json")
    assert code == 1 and "no reply within 0.3 s" in line
    server.fault = lambda handler, request: bool(request) and (handler.reply({"choices": []}) or True)
    code, line = failure(server, "--no-probe", "--json")
    assert code == 1 and "chat completion" in line


def test_wrong_input_is_told_before_any_server_is_asked(server, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"question": "a"}\n{"text": "b"}\n')
    good, foreign, run = tmp_path / "good.jsonl", tmp_path / "notes", tmp_path / "run"
    good.write_text('{"question": "a"}\n')
    foreign.write_text("my notes\n")
    run.mkdir()
    (run / "evaluation.jsonl").write_text("{}\n")
    cases = {
        ("--base-url", "localhost:8000"): "use http://HOST:PORT/v1",
        ("--worker-url", "http://h:port/v1"): "--worker-url",
        ("--temperature", "-1"): "--temperature must be at least 0",
        ("--json",): "--json goes with --question",
        ("--question", " "): "--question is empty",
        ("--question", "q", "--benchmark"): "exclude each other",
        ("--input", str(source)): "--input needs --output",
        ("--input", str(source), "--output", str(tmp_path / "o")): "in.jsonl:2",
        ("--input", "none.jsonl", "--output", "o"): "none.jsonl does not exist",
        ("--output", "o"): "--output goes with",
        ("--training-config", "none.json"): "none.json does not exist",
        ("--benchmark", "--dataset", "./none.jsonl"): "none.jsonl does not exist",
        ("--input", str(tmp_path), "--output", "o"): "is a folder",
        ("--input", str(source), "--output", str(source)): "are the same file",
        ("--input", str(good), "--output", "/proc/answers.jsonl"): "cannot be written",
        ("--input", str(good), "--output", str(foreign)): "name another file",
        ("--benchmark", "--output", str(run)): "already holds evaluation.jsonl, which is not overwritten",
        ("--benchmark", "--output", str(good)): "is a file",
        ("--benchmark", "--output", "/proc/scores"): "cannot be written",
        ("--samples", "5", "--question", "q"): "--samples goes with --benchmark",
    }
    for flags, message in cases.items():
        with pytest.raises(UserError) as caught:
            inference_vllm.main(["--base-url", server.url, *flags])
        assert caught.value.exit_code == 2 and message in str(caught.value), flags
    assert server.requests == []
    assert foreign.read_text() == "my notes\n" and sorted(path.name for path in tmp_path.iterdir()) == [
        "good.jsonl", "in.jsonl", "notes", "run",
    ]  # fmt: skip


def test_the_adapters_training_settings_are_used_unless_overridden(server, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "training_config.json").write_text(
        json.dumps({"settings": {"planner_style": "short", "worker_style": "few-shot", "worker_max_tokens": 33}})
    )
    server.models = [MODELS[0], {**MODELS[1], "root": str(adapter)}]
    assert ask(server, "--json", "--worker-max-tokens", "44") == 0
    planner = next(r for r in server.requests if "response_format" in r)
    assert planner["messages"][0]["content"].startswith("Split the problem for a worker")
    worker = [r for r in server.requests if r["model"] == "base" and "logprobs" not in r]
    assert {r["max_tokens"] for r in worker} == {44}
    assert worker[0]["messages"][-1]["content"] in (
        "What is 2 + 3?",
        "What is 4 + 1?",
    )  # few-shot: no question around it


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
    """The slow question's subproblem is still being solved when the quick one is combined."""
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
    """A real run of two steps; a question that the server refuses is masked, and the run records it."""
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
    # The printed command serves this very adapter: its rank, a spare slot, and the base it was trained on.
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
    ):
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


@pytest.mark.parametrize(("rank", "pattern", "served"), [(4, {}, 8), (16, {}, 16), (12, {"q_proj": 20}, 32)])
def test_the_server_command_has_a_rank_that_vllm_takes(tmp_path, rank, pattern, served):
    config = {"peft_type": "LORA", "r": rank, "rank_pattern": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    command = shown_command(server_command("owner/model", tmp_path, cpu=False))
    assert command == (
        "python -m vllm.entrypoints.openai.api_server --model owner/model --enable-lora "
        f"--max-lora-rank {served} --max-loras 2 --lora-modules recursive_reasoner={tmp_path} --port 8000"
    )
