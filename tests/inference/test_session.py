"""One question to a server: checks before it, output, and wrong input."""

from __future__ import annotations

import json
import socket
import time

import pytest
from conftest import ask, failure, run_script
from misbehaving import MODELS

import inference_vllm
from common.errors import UserError
from common.settings.inference import ServingArgs


def test_one_question_is_planned_split_solved_and_combined(server, capsys):
    assert ask(server, "--json", "--temperature", "0.3") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["decision"], record["plan_state"], record["answer"]) == ("split", "valid", "5")
    assert record["subproblems"] == ["What is 2 + 3?", "What is 4 + 1?"]
    assert (record["planner_tokens"], record["worker_tokens"]) == (7, 21)
    planner = [r for r in server.requests if "response_format" in r]
    worker = [r for r in server.asked if r["model"] == "base" and "logprobs" not in r]
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
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f":{port}/v1" in line and "is the server up" in line


@pytest.mark.parametrize(
    ("body", "kind"),
    [("<html>It works!</html>", "text/html"), ("{", "application/json"), ('{"data": 3}', "application/json")],
)
def test_something_else_answers(server, body, kind):
    server.fault = lambda handler, request: handler.reply(body, kind=kind) or True
    code, line = failure(server)
    assert code == 2 and "no OpenAI-compatible server" in line


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
    server.models = MODELS[1:]
    code, line = failure(server)
    assert code == 2 and line.startswith("the server of --base-url serves no base model besides the planner")
    assert line.endswith("or name another server with --base-url")
    server.models = MODELS
    other = {**MODELS[0], "id": "second", "root": "/other"}
    server.models = [*MODELS, other]
    code, line = failure(server, "--model", "second")
    assert code == 2 and "is an adapter of base, not of --model second" in line
    server.models = [*MODELS, {**other, "root": "/m"}]  # the same model under another name
    assert ask(server, "--model", "second", "--json") == 0


def test_an_adapter_that_equals_the_base_is_refused(server, capsys):
    server.same_as_base = True
    code, line = failure(server)
    assert code == 3 and "answers exactly like base" in line
    assert ask(server, "--no-probe", "--json") == 0


def test_a_contaminated_base_is_refused_with_the_remedy(server):
    """The adapter answers base requests while adapter requests are in flight, as on vLLM's CPU backend."""
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
        ("--lora-adapter", ""): "--lora-adapter is empty",
        ("--worker-model", ""): "--worker-model is empty",
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
        ("--benchmark", "--output", str(tmp_path)): "holds other files (good.jsonl, in.jsonl, notes and 1 more)",
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
    worker = [r for r in server.asked if r["model"] == "base" and "logprobs" not in r]
    assert {r["max_tokens"] for r in worker} == {44}
    assert worker[0]["messages"][-1]["content"] in (
        "What is 2 + 3?",
        "What is 4 + 1?",
    )  # few-shot: without the question
