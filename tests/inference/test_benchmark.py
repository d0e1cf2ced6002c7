"""The benchmark against a server on real HTTP: a request that fails is an error of its question, not a bad plan."""

from __future__ import annotations

import json

from conftest import ask, failure
from misbehaving import asks

from common.inference.benchmark import held_out_questions
from common.inference.session import Session
from common.reports.jsonl import read_jsonl

SOURCE = "generated:shares?people=3"
FLAGS = ("--benchmark", "--samples", "4", "--dataset", SOURCE, "--no-probe", "--worker-style", "instruct")


def test_a_plan_that_was_never_written_is_an_error_and_not_an_invalid_plan(server, tmp_path, capsys):
    with Session({"base_url": server.url, "dataset": SOURCE, "samples": 4, "probe": False}) as session:
        asked = [item.question for item in held_out_questions(session)]

    def fault(handler, request):
        if request and request["model"] == "recursive_reasoner" and asks(request, asked[1]):
            return handler.error(400, "too long")
        return False

    server.fault = fault
    board = tmp_path / "board"
    assert ask(server, *FLAGS, "--output", str(board)) == 1
    shown = capsys.readouterr().out
    assert (
        "trained planner: 1 of 4 questions failed without a plan, 0 while the worker solved them\n  the first: planner: "
        in shown
    )
    assert "plans of the trained planner: 3 valid (100%)" in shown
    row = json.loads((board / "evaluation.json").read_text())["rows"]["trained planner"]
    assert (row["errors"], row["planner_failures"], row["invalid_plan_rate"]) == (1, 1, 0)
    records = read_jsonl(board / "evaluation.jsonl")
    failed = [record for record in records if record["error"] is not None]
    assert [(record["row"], record["question"]) for record in failed] == [("trained planner", asked[1])]
    assert failed[0]["error"].startswith("planner: ") and failed[0]["final"] is None, "it was not solved directly"
    fingerprints = {record["row"]: record["fingerprint"] for record in records}
    assert fingerprints["untrained planner"].keys() == fingerprints["trained planner"].keys()
    assert fingerprints["untrained planner"]["planner"] != fingerprints["trained planner"]["planner"]
    assert fingerprints["direct"]["worker"] == fingerprints["trained planner"]["worker"]


def test_a_planner_that_never_answers_has_no_scoreboard(server):
    def fault(handler, request):
        return bool(request) and request["model"] == "recursive_reasoner" and handler.error(500, "broken")

    server.fault = fault
    code, line = failure(server, *FLAGS)
    assert code == 1 and "every request to recursive_reasoner failed" in line and "broken" in line


def test_what_lies_here_is_looked_at_before_the_server_is_asked(server, tmp_path):
    """The file of --training-config, the settings in it, and the questions that it names."""
    config = tmp_path / "training_config.json"
    wrong = {
        "no object": "is no training_config.json",
        json.dumps({"settings": {"worker_max_tokens": -1}}): f"{config}: --worker-max-tokens must be greater",
        json.dumps({"settings": {"dataset": str(tmp_path / "gone.jsonl")}}): "gone.jsonl does not exist",
        json.dumps({"settings": {"dataset": "reasoning-gym:chain_sun"}}): "no task 'chain_sun'",
    }
    heard = []
    server.fault = lambda handler, request: heard.append(handler.path) is not None
    for text, told in wrong.items():
        config.write_text(text)
        code, line = failure(server, "--benchmark", "--training-config", str(config))
        assert code == 2 and told in line
    assert heard == []


def test_composed_questions_are_counted_apart_with_their_problems_alone(server, tmp_path, capsys):
    board = tmp_path / "board"
    source = ["--dataset", "multi:generated:shares?people=2&parts=2&single=0.4", "--worker-context", "none"]
    assert ask(server, *FLAGS, "--samples", "8", *source, "--output", str(board)) == 0
    apart = json.loads((board / "evaluation.json").read_text())["composed"]
    assert apart["composed"] + apart["single"] == 8 and 0 < apart["single"] < 8
    records = [record for record in read_jsonl(board / "evaluation.jsonl") if record["row"] == "parts alone"]
    assert len(records) == 2 * apart["composed"] and not any("(A)" in record["question"] for record in records)
    assert "composed: reasoning gap" in capsys.readouterr().out
    split = [sent for sent in server.requests if "Answer just this part" in json.dumps(sent)]
    assert split == [], "without context nothing is asked as a part of something"
