"""Variants of OpenAI's reply: why an answer ended, where it is, how long it was, errors with status 200."""

from __future__ import annotations

import json

import pytest
from conftest import ask, failure
from misbehaving import PLAN, asks, reshaped

from common.generation import Generation
from common.prompts import direct_messages
from common.servers.client import Endpoint, Server
from common.workers.remote import ServerWorker


def answer_of(server, **change) -> Generation:
    """The worker's answer to a changed reply; `choice`, `message` and `usage` name the changes."""

    def apply(reply, choice):
        choice.update(change.get("choice", {}))
        choice["message"].update(change.get("message", {}))
        reply["usage"] = change.get("usage", reply["usage"])

    reshaped(server, apply)
    return ServerWorker(Server(Endpoint(server.url, retries=0)), "base", max_tokens=9).solve_directly("How many?")


def test_only_the_limit_and_filters_cut_an_answer_off(server):
    finished = ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "STOP", "FinishReason.STOP", None, "", "odd")
    cut = ("length", "max_tokens", "MAX_TOKENS", "model_length", "content_filter", "SAFETY", "abort")
    for reason in (*finished, *cut):
        assert answer_of(server, choice={"finish_reason": reason}).finished == (reason in finished), reason
    # Without a finish reason the length decides: the token limit was reached.
    assert not answer_of(server, choice={"finish_reason": None}, usage={"completion_tokens": 9}).finished


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "reasoning_content": '{"final_answer": 5}'}, '{"final_answer": 5}'),
        ({"content": None, "reasoning": "I add. The answer is 5."}, "I add. The answer is 5."),
        ({"content": "", "reasoning_details": [{"type": "reasoning.text", "text": "5"}]}, "5"),
        ({"content": "6", "reasoning_content": "perhaps 5"}, "6"),
        ({"content": None}, ""),
        ({"content": None, "refusal": "no"}, ""),
        ({"content": [{"type": "text", "text": "The answer "}, {"type": "text", "text": "is 5."}]}, "The answer is 5."),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "4?"}]}, {"type": "text", "text": "5"}]}, "5"),
        ({"content": {"final_answer": 5}}, '{"final_answer": 5}'),
    ],
)  # fmt: skip
def test_an_answer_is_found_where_the_server_put_it_and_none_is_an_empty_one(server, message, text):
    found = answer_of(server, message=message)
    assert (found.text, found.error, found.finished) == (text, None, True)


def test_reasoning_that_was_cut_off_is_no_answer(server):
    message = {"content": None, "reasoning_content": "perhaps the answer is 4"}
    assert answer_of(server, message=message, choice={"finish_reason": "length"}) == Generation("", 7, False)


def test_a_plan_in_the_reasoning_field_is_carried_out(server, capsys):
    def apply(reply, choice):
        choice["message"] = {"role": "assistant", "content": None, "reasoning_content": choice["message"]["content"]}
        choice["finish_reason"] = "eos_token"

    reshaped(server, apply)
    assert ask(server, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["planner_output"], record["plan_state"], record["answer"]) == (PLAN, "valid", "5")


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"output_tokens": 6, "input_tokens": 4}, 6),
        ({"completion_tokens": 0, "prompt_tokens": 30, "total_tokens": 36}, 6),
        ({"completion_tokens": 0, "prompt_tokens": 0, "total_tokens": 0}, None),
        ({"completion_tokens": None}, None),
        (None, None),
        ("many", None),
    ],
)
def test_tokens_that_a_server_does_not_tell_are_unknown_not_none(server, usage, tokens):
    assert answer_of(server, usage=usage).tokens == tokens


def test_tokens_are_counted_with_a_tokenizer_and_told_once(server, caplog):
    reshaped(server, lambda reply, choice: reply.update(usage=None))
    counting = Server(Endpoint(server.url), count_tokens=lambda text: len(text.split()))
    answers = ServerWorker(counting, "base").generate([direct_messages(f"Question {n}") for n in range(3)])
    assert [answer.tokens for answer in answers] == [3, 3, 3], "two words and the end token"
    assert [record.getMessage() for record in caplog.records if "token counts" in record.message] == [
        f"{server.url} reports no token counts: its answers are counted with the planner's tokenizer"
    ]


def test_unknown_counts_are_shown_as_unknown_and_no_scoreboard_is_made_of_them(server, capsys):
    reshaped(server, lambda reply, choice: reply.update(usage={"completion_tokens": 0, "prompt_tokens": 0}))
    assert ask(server, "--no-probe") == 0
    assert "unknown + unknown tokens" in capsys.readouterr().out
    assert ask(server, "--no-probe", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["planner_tokens"], record["worker_tokens"], record["answer"]) == (None, None, "5")
    code, line = failure(server, "--no-probe", "--benchmark", "--dataset", "generated:shares", "--samples", "2")
    assert code == 1 and "no token counts" in line


@pytest.mark.parametrize(
    ("status", "message"),
    [(500, ""), (400, "Failed to convert the output regex"), (501, "unsupported"), (422, "extra fields"), (200, "bad")],
)
def test_a_schema_that_makes_the_server_fail_is_left_out(server, capsys, caplog, status, message):
    server.fault = lambda handler, request: (
        "response_format" in request and (handler.reply({"error": {"message": message}}, status) or True)
    )
    assert ask(server, "--json") == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "5"
    assert len([r for r in server.requests if "response_format" in r]) == 1
    assert f"{server.url} takes no JSON schema" in caplog.text


def test_a_failure_that_the_schema_is_not_to_blame_for_does_not_cost_it(server):
    failed = []

    def fault(handler, request):
        if asks(request, "How many?") and not failed:
            failed.append(request)
            return handler.error(500, "")
        return False

    server.fault = fault
    assert ask(server, "--retries", "1", "--json") == 0
    assert ["response_format" in r for r in server.requests if asks(r, "How many?")][:2] == [True, True]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
        (400, "Developer instruction is not enabled for this model"),
        (422, "Template error: undefined role"),
        (500, "jinja2.exceptions.TemplateError: System role not supported"),
        (500, "System role not supported"),
    ],
)
def test_a_template_that_refuses_the_system_role_gets_the_instructions_in_the_users_message(server, status, message):
    server.fault = lambda handler, request: (
        bool(request) and request["messages"][0]["role"] == "system" and handler.error(status, message)
    )
    assert ask(server, "--json", "--retries", "3") == 0
    last = server.requests[-1]["messages"]
    assert [m["role"] for m in last] == ["user"] and "You solve math word problems" in last[0]["content"]
    planner = [r for r in server.requests if "response_format" in r]
    assert len(planner) == 1 and "You plan how to solve" in planner[0]["messages"][0]["content"]


def test_a_template_that_drops_the_system_message_is_found_out(server, capsys):
    """Only the length of the prompt shows it."""

    def count(reply, choice):
        kept = [m for m in server.requests[-1]["messages"] if m["role"] != "system"]
        reply["usage"]["prompt_tokens"] = sum(len(m["content"].split()) for m in kept)

    reshaped(server, count)
    assert ask(server, "--json", "--no-probe") == 0
    asked = [r["messages"] for r in server.asked]
    assert all(messages[0]["role"] == "user" for messages in asked)
    assert any("You plan how to solve" in messages[0]["content"] for messages in asked)
    assert "drops system messages" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "the engine is dead", "code": 400}},
        {"error": "the engine is dead"},
        {"object": "error", "message": "the engine is dead", "code": 40301},
        {"detail": "the engine is dead"},
        {"choices": [{"error": {"code": 502, "message": "the engine is dead"}, "message": {"content": ""}}]},
    ],
)
def test_an_error_with_status_200_is_told(server, body):
    server.fault = lambda handler, request: bool(request) and (handler.reply(body) or True)
    code, line = failure(server, "--json", "--no-probe")
    assert code in (1, 2) and "the engine is dead" in line


@pytest.mark.parametrize(
    "body",
    [{"choices": []}, {"choices": None}, {"choices": [None]}, {"choices": [{}]}, [], "null", "no JSON", '"text"'],
)
def test_a_reply_without_an_answer_is_one_line(server, body):
    server.fault = lambda handler, request: bool(request) and (handler.reply(body) or True)
    code, line = failure(server, "--json", "--no-probe")
    assert code == 1 and "no OpenAI-compatible server" in line
