"""Requests to a server: retries, fallbacks, and errors in one line."""

from __future__ import annotations

import json

from conftest import ask, failure
from misbehaving import asks, hang


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


def test_trouble_that_passes_is_retried_and_trouble_that_stays_is_told(server, capsys):
    served = []

    def fault(handler, request):
        if not asks(request, "How many?"):
            return False
        served.append(1)
        if len(served) == 1:
            return handler.error(503, "loading", Retry_After="0")
        if len(served) == 2:
            handler.reply(server.completion(request), cut=40)  # the connection breaks within the reply
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
