"""A file of questions to a server, on real HTTP: all are answered, it can be resumed, and errors are reported."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, ask, failure
from misbehaving import asks, hang

from common.errors import UserError
from common.inference.batch import read_input


def test_a_file_is_answered_whole_but_for_what_fails_and_then_resumed(server, tmp_path, capsys):
    questions = [f"Question {number}: 2 + 3?" for number in range(6)]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "".join(json.dumps({"question": q, "answer": "#### 5", "id": q[:10]}) + "\n\n" for q in questions)
    )

    def fault(handler, request):
        if asks(request, "Question 4"):
            return handler.error(400, "This model's maximum context length is 2048 tokens")
        return False

    server.fault = fault
    flags = ("--input", str(source), "--output", str(output), "--worker-style", "instruct")
    assert ask(server, *flags) == 1
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["question"] for record in records] == questions
    assert [record["line"] for record in records] == [1, 3, 5, 7, 9, 11]
    assert [record["error"] is None for record in records] == [True] * 4 + [False, True]
    assert "maximum context length" in records[4]["error"]
    assert [record.get("correct") for record in records] == [True] * 4 + [False, True]
    assert "1 failed" in capsys.readouterr().err

    asked_before = len(server.asked)
    server.fault = lambda handler, request: False
    assert ask(server, *flags, "--no-probe") == 0
    assert len(server.asked) - asked_before == 4  # plan, two subproblems, combination: the failed one
    assert all(json.loads(line)["error"] is None for line in output.read_text().splitlines())

    source.write_text(json.dumps({"question": "Another?"}) + "\n")
    code, line = failure(server, *flags)
    assert code == 2 and "other questions" in line


def test_ctrl_c_leaves_a_file_that_the_same_command_finishes(server, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"question": f"Question {n}?"}) + "\n" for n in range(200)))
    server.fault = hang(0.1)
    command = [sys.executable, "inference_vllm.py", "--base-url", server.url, "--input", str(source)]
    command += ["--output", str(output), "--concurrency", "2", "--no-probe"]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not output.exists() or output.read_text().count("\n") < 3:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=120)
    assert running.returncode == 130 and "Traceback" not in told
    before = output.read_text()
    assert 3 <= before.count("\n") < 200
    server.fault = lambda handler, request: False
    assert ask(server, "--input", str(source), "--output", str(output), "--no-probe") == 0
    lines = output.read_text().splitlines()
    assert len(lines) == 200 and set(before.splitlines()) <= set(lines)


@pytest.mark.parametrize("answer", [5, 5.0, "5", "2 + 3 = 5\n#### 5"])
def test_a_known_answer_may_be_a_number_or_text(server, tmp_path, answer):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"question": "2 + 3?", "answer": answer}) + "\n")
    assert ask(server, "--input", str(source), "--output", str(output), "--no-probe") == 0
    assert json.loads(output.read_text())["correct"] is True


def test_an_output_that_goes_away_is_told(server, tmp_path):
    source, folder = tmp_path / "in.jsonl", tmp_path / "stick"
    source.write_text('{"question": "a"}\n{"question": "b"}\n')
    folder.mkdir()

    def fault(handler, request):
        if server.asked and folder.is_dir():
            shutil.rmtree(folder)
            folder.write_text("what was plugged in there instead")
        return False

    server.fault = fault
    code, line = failure(server, "--input", str(source), "--output", str(folder / "out.jsonl"), "--no-probe")
    assert code == 1 and "could not be written" in line and "the same command goes on from there" in line


def test_a_file_with_a_byte_order_mark_and_half_characters_is_answered(server, tmp_path):
    """The byte-order mark of Windows editors, and halves of surrogate pairs in a question and in an answer."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions = ["Größe?", "half \ud83d a pair?"]
    lines = "".join(
        json.dumps({"question": question}, ensure_ascii=question.startswith("h")) + "\n" for question in questions
    )
    source.write_bytes(b"\xef\xbb\xbf" + lines.encode())

    def fault(handler, request):
        if asks(request, "What is 2 + 3?") and not asks(request, "already solved"):
            handler.reply(server.completion(request, 'half \ud83d {"final_answer": 5}'))
            return True
        return False

    server.fault = fault
    assert ask(server, "--input", str(source), "--output", str(output), "--no-probe") == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["question"] for record in records] == questions
    assert all(record["error"] is None and "\ud83d" in record["solutions"][0] for record in records)
    assert any(asks(request, "half ? a pair?") for request in server.requests)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("none", "no number in 'answer', found 'none'"),
        ("", "no number in 'answer', found ''"),
        ("see #### none", "no number after '####' (expected '… #### 42'): 'see #### none'"),
    ],
)
def test_an_answer_without_a_number_is_quoted_as_it_was_written(tmp_path, answer, told):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": answer}) + "\n")
    with pytest.raises(UserError) as caught:
        read_input(str(path))
    assert told in str(caught.value) and f"{path}:1: " in str(caught.value)


def test_what_a_kill_left_beside_the_answers_is_removed(server, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"question": "What is 2 + 3?"}\n')
    killed_within_its_write = (
        "import pathlib, resource, signal, sys; from common.runs.files import write_text_atomically;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9));"
        "write_text_atomically(pathlib.Path(sys.argv[1]), 'x' * 99)"
    )
    ended = subprocess.run([sys.executable, "-c", killed_within_its_write, str(output)], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGXFSZ
    other = tmp_path / ".out.jsonl.bak"  # not named as such a file
    other.write_text("kept")
    assert len(list(tmp_path.glob(".out.jsonl.*.tmp"))) == 1
    assert ask(server, "--input", str(source), "--output", str(output)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, source.name, output.name]
