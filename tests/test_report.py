"""Reports and callbacks: files survive kills and odd values, pictures are drawn, signals stop a run."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import multiprocessing
import os
import pty
import random
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from transformers import TrainerControl, TrainerState, TrainingArguments

from common.callbacks import CollapseWarning, ProgressCallback, ReportCallback, StopOnSignal
from common.errors import UserError
from common.plots import plot_training_curves
from common.report import append_jsonl, format_table, read_jsonl, truncate_jsonl_after

ROOT = Path(__file__).resolve().parents[1]


# --------------------------------------------------------------------------------------------- JSON lines


def test_a_record_reads_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "er" / "x.jsonl"  # directories appear as needed
    records = [
        {"step": 1, "text": "naïve 日本 😀 line\nbreak \u2028 \x00"},
        {"step": 2, "nested": {"list": [1, 2.5, True, None], "empty": {}}},
    ]
    for record in records:
        append_jsonl(path, record)
    assert read_jsonl(path) == records
    assert path.read_bytes().count(b"\n") == 2
    assert "日本" in path.read_text(encoding="utf-8")


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "x.jsonl"
    append_jsonl(path, {"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf}, "e": np.float32("nan")})
    assert read_jsonl(path) == [{"a": None, "b": [None, 1.0], "c": {"d": None}, "e": None}]
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_types_that_json_lacks_are_written_all_the_same(tmp_path):
    path = tmp_path / "x.jsonl"
    append_jsonl(path, {"p": Path("/a"), "n": np.float32(0.5), "i": np.int64(3), "a": np.arange(2), "s": {7}, 1: (2,)})
    assert read_jsonl(path) == [{"p": "/a", "n": 0.5, "i": 3, "a": [0, 1], "s": [7], "1": [2]}]


def test_half_a_surrogate_pair_reads_back(tmp_path):
    path = tmp_path / "x.jsonl"
    record = {"text": "torn \ud83d emoji \udc00", "\udfff": 1}
    append_jsonl(path, record)
    assert read_jsonl(path) == [record]
    path.read_bytes().decode("utf-8")  # and the file is still UTF-8


@pytest.mark.parametrize("torn", ['{"step": 3, "te', "{", '{"step": 3, "t": "é'.encode()[:-1], b"\x00\x00\x00", "42"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + (torn if isinstance(torn, bytes) else torn.encode()))
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]


@pytest.mark.parametrize("broken", ['{"step": 2, "te', "[1]", "7", "not json"])
def test_a_broken_line_elsewhere_is_an_error_with_its_number(tmp_path, broken):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n\n' + broken + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 3") as caught:
        read_jsonl(path)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_missing_or_empty_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert read_jsonl(tmp_path / "empty.jsonl") == []


def test_appending_after_a_kill_does_not_glue_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "te')
    append_jsonl(path, {"step": 2})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]
    # a last line that lacks only its newline is complete: it stays
    path.write_text('{"step": 1}\n' + json.dumps({"step": 2, "text": "x" * 200_000}))
    append_jsonl(path, {"step": 3})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3]
    # and a torn line longer than the block that is read back
    path.write_text('{"step": 1}\n{"text": "' + "x" * 200_000)
    append_jsonl(path, {"step": 2})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]


def test_every_line_before_a_kill_is_on_disk(tmp_path):
    path = tmp_path / "x.jsonl"
    code = (
        "import itertools, sys\nfrom common.report import append_jsonl\n"
        "for step in itertools.count(1):\n"
        "    append_jsonl(sys.argv[1], {'step': step, 'text': 'é' * 3000})\n    print(step, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 20:
            break
    child.kill()
    reported = [20] + [int(line) for line in child.stdout.read().split("\n") if line.isdigit()]
    child.wait()
    child.stdout.close()
    assert len(read_jsonl(path)) >= max(reported)


def test_resume_cuts_the_steps_after_the_checkpoint(tmp_path):
    path = tmp_path / "x.jsonl"
    for step in range(1, 11):
        append_jsonl(path, {"step": step, "text": "é\u2028"})
    kept = path.read_bytes().split(b"\n")[:6]
    with path.open("a") as file:
        file.write('{"step": 11, "to')
    assert truncate_jsonl_after(path, 6) == 5  # four steps and the torn line
    assert path.read_bytes() == b"\n".join(kept) + b"\n"  # kept lines are kept to the byte
    assert truncate_jsonl_after(path, 6) == 0
    assert truncate_jsonl_after(path, 0) == 6
    assert read_jsonl(path) == []
    assert truncate_jsonl_after(tmp_path / "none.jsonl", 3) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]  # no temporary file left


def test_resume_does_not_touch_a_file_it_cannot_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        truncate_jsonl_after(path, 1)
    assert path.read_text() == '{"step": 1}\nbroken\n{"step": 3}\n'


# -------------------------------------------------------------------------------------------- the picture


def synthetic_step(step, rng):
    correct = min(1.0, 0.1 + step / 500 + rng.random() / 5)
    return {
        "step": step,
        "reward": correct + 0.3,
        "reward_std": 0.2,
        "correctness": correct,
        "token_efficiency": 0.6,
        "independence": None if step % 3 else 0.5,
        "decomposition_rate": rng.random(),
        "invalid_plan_rate": 0.0,
        "distinct_plans": 1.0,
        "planner_tokens": 80.0 + step,
        "worker_tokens": 300.0,
    }


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("steps", [0, 1, 2, 12, 31, 300])
def test_curves_for_any_number_of_steps(tmp_path, steps):
    rng = random.Random(0)
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "plots" / "curves.png"
    metrics.touch()
    for step in range(1, steps + 1):
        append_jsonl(metrics, synthetic_step(step, rng))
    plot_training_curves(metrics, picture, title="costs $5_x or $6^y {a}")
    width, height = png_size(picture)
    assert width > 1000 and height > 600
    assert picture.stat().st_size > 20_000
    assert [p.name for p in picture.parent.iterdir()] == ["curves.png"]


def test_curves_with_missing_keys_gaps_and_a_torn_line(tmp_path):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    append_jsonl(metrics, {"step": 5, "reward": 0.5, "loss": 0.1})
    append_jsonl(metrics, {"step": 10, "reward": None, "reward_std": 0.1, "correctness": math.nan})
    append_jsonl(metrics, {"step": 10, "reward": 0.7, "reward_std": 0.1})  # a step logged twice: the last counts
    append_jsonl(metrics, {"step": 15, "correctness": 1, "planner_tokens": 0})
    with metrics.open("a") as file:
        file.write('{"step": 20, "rew')
    plot_training_curves(metrics, picture)
    png_size(picture)
    only_loss = tmp_path / "loss.jsonl"
    append_jsonl(only_loss, {"step": 1, "loss": 2.0})
    plot_training_curves(only_loss, picture)
    png_size(picture)


def test_drawing_leaves_no_state_behind(tmp_path):
    """No pyplot: its figures would pile up over a long run, and its backend may want a display."""
    code = (
        "import sys\nfrom common import plots, report\nassert 'matplotlib' not in sys.modules\n"
        "report.append_jsonl(sys.argv[1] + '/m.jsonl', {'step': 1, 'reward': 0.5})\n"
        "plots.plot_training_curves(sys.argv[1] + '/m.jsonl', sys.argv[1] + '/c.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=60)


# ----------------------------------------------------------------------------------------------- the table


def test_table_aligns_numbers_to_the_right():
    table = format_table(
        [
            {"system": "direct", "correct": "41.2%", "n": 48, "tokens": 123.44, "p": None},
            {"system": "trained", "correct": "3.0%", "n": 1319, "tokens": 1023.4, "p": 0.0312},
        ]
    )
    assert table.splitlines() == [
        "system   correct     n   tokens      p",
        "───────  ───────  ────  ───────  ─────",
        "direct     41.2%    48    123.4      -",
        "trained     3.0%  1319  1,023.4  0.031",
    ]


def test_table_of_plain_rows_and_chosen_columns():
    assert format_table([["a", 1], ["bb", 22]], ["name", "value"]).splitlines()[2:] == ["a         1", "bb       22"]
    assert "hidden" not in format_table([{"a": 1, "hidden": 2}], ["a"])
    assert format_table([]) == ""
    assert format_table([], ["a", "b"]).splitlines()[0] == "a  b"
    with pytest.raises(ValueError, match="2 cells"):
        format_table([["a"]], ["x", "y"])


def test_table_survives_model_text():
    row = {"text": "two\nlines\t\x1b[31mred\x1b[0m \ud83d " + "x" * 100, "wide": "日本", "flag": True, "nan": math.nan}
    lines = format_table([row, {"text": "short", "wide": "abcd", "flag": False, "nan": 1.0}], max_width=30).splitlines()
    assert len(lines) == 4 and "\x1b" not in "".join(lines) and "…" in lines[2]
    "".join(lines).encode("utf-8")
    assert "日本  yes" in lines[2] and "abcd  no" in lines[3]  # two columns of a terminal each


# ------------------------------------------------------------------------------------------- the callbacks


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("args")), use_cpu=True, report_to=[])


def state_at(step, max_steps=100, main=True):
    return TrainerState(global_step=step, max_steps=max_steps, logging_steps=1, is_world_process_zero=main)


def test_report_writes_a_line_per_training_step(tmp_path, args):
    report, control = ReportCallback(tmp_path, plot_every=2), TrainerControl()
    report.on_train_begin(args, state_at(0), control)
    logs = {"loss": 0.5, "reward": np.float64(0.25), "entropy": math.nan, "correctness": None, "note": "text", "n": 3}
    report.on_log(args, state_at(1), control, logs=logs, model=None)
    assert not report.plot_path.exists()
    report.on_log(args, state_at(2), control, logs={"loss": 0.4})
    assert report.plot_path.exists()
    report.on_log(args, state_at(2), control, logs={"eval_loss": 1.0, "epoch": 0.1})  # a line of its own
    report.on_log(args, state_at(2), control, logs={"train_runtime": 1.0, "train_loss": 1.0})  # the summary
    report.on_log(args, state_at(3, main=False), control, logs={"loss": 0.4})  # another process
    first, second, evaluation = read_jsonl(tmp_path / "metrics.jsonl")
    assert evaluation == {"step": 2, "eval_loss": 1.0}
    assert abs(first.pop("time") - time.time()) < 60
    assert first == {"step": 1, "loss": 0.5, "reward": 0.25, "entropy": None, "correctness": None, "n": 3}
    assert second["step"] == 2 and second["loss"] == 0.4


def test_report_draws_at_the_end_and_resumes_where_the_checkpoint_was(tmp_path, args):
    control = TrainerControl()
    for step in range(1, 8):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "reward": 0.1})
    report = ReportCallback(tmp_path, plot_every=0)
    report.on_train_begin(args, state_at(5), control)
    report.on_log(args, state_at(6), control, logs={"reward": 0.9})
    assert [(r["step"], r["reward"]) for r in read_jsonl(tmp_path / "metrics.jsonl")][-2:] == [(5, 0.1), (6, 0.9)]
    assert not report.plot_path.exists()
    report.on_train_end(args, state_at(6), control)
    png_size(report.plot_path)


def test_a_picture_that_cannot_be_drawn_is_only_a_warning(tmp_path, args, caplog):
    (tmp_path / "training_curves.png").mkdir()  # in the way
    report = ReportCallback(tmp_path, plot_every=1)
    with caplog.at_level(logging.WARNING):
        report.on_log(args, state_at(1), TrainerControl(), logs={"reward": 0.9})
    assert "could not draw" in caplog.text
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def warnings_of(callback, args, caplog, series):
    caplog.clear()
    steps = []
    for step, (distinct, reward) in enumerate(series, start=1):
        before = len(caplog.records)
        logs = {"reward": reward} if distinct is None else {"distinct_plans": distinct, "reward": reward}
        callback.on_log(args, state_at(step), TrainerControl(), logs=logs)
        steps += [step] * (len(caplog.records) - before)
    return steps


def test_collapse_is_reported_while_the_reward_rises(args, caplog):
    healthy, collapsed = [(0.9, 0.3)] * 10, [(0.1, 0.5 + i / 100) for i in range(60)]
    assert warnings_of(CollapseWarning(), args, caplog, healthy + collapsed) == [20, 40, 60]
    message = caplog.records[0].getMessage()
    assert "\n" not in message and "10%" in message and "0.300" in message
    # few distinct plans without a rising reward, a rising reward with distinct plans, no metric: silence
    assert warnings_of(CollapseWarning(), args, caplog, [(0.1, 0.5)] * 40) == []
    assert warnings_of(CollapseWarning(), args, caplog, [(0.9, i / 40) for i in range(40)]) == []
    assert warnings_of(CollapseWarning(), args, caplog, [(None, i / 40) for i in range(40)]) == []
    assert warnings_of(CollapseWarning(window=3), args, caplog, [(0.9, 0.1)] * 3 + [(0.1, 0.2)] * 3) == [6]


def run_steps(callback, args, steps, max_steps, log_every=1):
    control = TrainerControl()
    callback.on_train_begin(args, state_at(0, max_steps), control)
    for step in range(1, steps + 1):
        control.should_log = step % log_every == 0
        callback.on_step_end(args, state_at(step, max_steps), control)
        if control.should_log:
            logs = {"reward": 0.5, "correctness": 0.25, "invalid_plan_rate": 0.125, "decomposition_rate": 1.0}
            callback.on_log(args, state_at(step, max_steps), control, logs=logs)
    callback.on_log(args, state_at(steps, max_steps), control, logs={"train_runtime": 1.0})
    callback.on_train_end(args, state_at(steps, max_steps), control)


def test_progress_without_a_terminal_is_a_few_plain_lines(args, capsys):
    run_steps(ProgressCallback(), args, 25, 25)
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert "reward 0.500  correct 25%  invalid 12%  decomposed 100%" in lines[0]
    assert "s/step" in lines[0] and "left" in lines[0]
    # stopped early, and steps that have no log of their own
    run_steps(ProgressCallback(), args, 13, 100, log_every=5)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/100", "11/100", "13/100"]


@pytest.mark.parametrize("rows_and_columns", [(24, 80), (0, 0)])
def test_progress_on_a_terminal_is_one_bar(args, rows_and_columns):
    pid, terminal = pty.fork()
    if pid == 0:  # a child of this process: importing transformers again would take seconds
        termios.tcsetwinsize(2, rows_and_columns)
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", closefd=False)  # noqa: PTH123, SIM115
        run_steps(ProgressCallback(), args, 5, 5)
        sys.stderr.flush()
        os._exit(0)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's end of file on a terminal
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    last = shown.decode().strip().split("\r")[-1]
    assert "5/5" in last and "reward 0.500" in last and "decomposed 100%" in last
    assert shown.count(b"\n") == 1  # always the same line


def stop_flags(stop, args, step=1):
    control = stop.on_step_end(args, state_at(step), TrainerControl())
    return control.should_save, control.should_training_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_for_a_checkpoint_the_second_interrupts(args, capfd, number):
    previous = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert stop.received is None and stop_flags(stop, args) == (False, False)
        os.kill(os.getpid(), number)
        assert stop.received is number
        assert stop_flags(stop, args) == (True, True)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is previous
    assert stop.received is number  # still known afterwards, for the exit code
    notice = capfd.readouterr().err
    assert notice.strip() == "saving a checkpoint after this step; press again to quit at once"


def test_a_signal_in_the_middle_of_logging_is_no_deadlock(args, capfd):
    """Signals land anywhere: also where the main thread holds the locks of logging and of a stream."""
    stopped = 0
    for _ in range(20):
        with StopOnSignal() as stop:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
            until = time.monotonic() + 5
            while stop.received is None and time.monotonic() < until:
                logging.getLogger("test_report.noise").error("x" * 1000)
                print("y" * 1000, file=sys.stderr, flush=True)
            stopped += stop_flags(stop, args) == (True, True)
    assert stopped == 20
    assert capfd.readouterr().err.count("saving a checkpoint") == 20


def test_a_forked_child_still_dies_of_sigterm(args):
    """Data loader workers inherit the handler; it must not make them deaf or let them speak."""
    with StopOnSignal() as stop:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGINT)  # ignored: the parent decides
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert stop.received is None


def rank_loop(rank, store, args, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with StopOnSignal() as stop:
        for step in range(1, 4):
            if rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            saves, stops = stop_flags(stop, args, step)
            if stops:
                break
    dist.destroy_process_group()
    results.put((rank, step, saves))


def test_all_processes_stop_when_one_gets_the_signal(tmp_path, args):
    """Two gloo processes, only one of which is signalled; a lone exit would hang the other."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=rank_loop, args=(rank, tmp_path / "store", args, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        assert sorted(results.get(timeout=60) for _ in ranks) == [(0, 2, True), (1, 2, True)]
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
