"""Requests to a server: retries, fallbacks, and errors in one line."""

from __future__ import annotations

import json
import time

from conftest import ask, failure
from misbehaving import asks, hang

from common.servers.client import Endpoint, Server
from common.workers.remote import ServerModel


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


def test_a_server_that_hangs_is_given_up_after_one_time_limit_however_many_wait(server):
    """Counts the requests that reach the server. Otherwise every retry and queued request would cost the limit."""
    model = ServerModel(Server(Endpoint(server.url, timeout=0.4, retries=5, concurrency=2)), "base")
    questions = [[{"role": "user", "content": f"How many, {number}?"}] for number in range(8)]
    server.fault = hang(1.5)
    answers = model.generate(questions)
    assert all("no reply within 0.4 s" in (answer.error or "") for answer in answers)
    assert len(server.requests) == 2
    server.fault = lambda handler, request: False
    assert [answer.error for answer in model.generate(questions)] == [None] * 8, "the next wave asks anew"


def test_a_slow_server_may_take_longer_for_all_than_for_one(server):
    def slow(handler, request):
        time.sleep(0.2)
        return False

    server.fault = slow
    model = ServerModel(Server(Endpoint(server.url, timeout=0.5, retries=0, concurrency=1)), "base")
    answers = model.generate([[{"role": "user", "content": f"How many, {number}?"}] for number in range(5)])
    assert [answer.error for answer in answers] == [None] * 5


def test_no_attempt_begins_after_the_time_limit(server):
    """A request that fails at once is repeated, but not for longer than the time limit of a reply."""
    server.fault = lambda handler, request: bool(request) and handler.error(503, "loading")
    model = ServerModel(Server(Endpoint(server.url, timeout=1.4, retries=50)), "base")
    (answer,) = model.generate([[{"role": "user", "content": "How many?"}]])
    assert "503" in (answer.error or "") and len(server.requests) == 2  # the third one would begin after 1.5 s or more
