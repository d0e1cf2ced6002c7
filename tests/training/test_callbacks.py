"""Callbacks of a training run: reports, progress, the warning of a collapse, and signals that stop it."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch.distributed as dist
from conftest import png_size, state_at
from transformers import TrainerControl

from common.reports.jsonl import append_jsonl, read_jsonl
from common.training.callbacks import CollapseWarning, InvalidWarning, ReportCallback, StopOnSignal


def test_report_writes_a_line_per_training_step(tmp_path, trainer_args):
    report, control = ReportCallback(tmp_path, plot_every=2), TrainerControl()
    report.on_train_begin(trainer_args, state_at(0), control)
    logs = {"loss": 0.5, "reward": np.float64(0.25), "entropy": math.nan, "correctness": None, "note": "text", "n": 3}
    report.on_log(trainer_args, state_at(1), control, logs=logs, model=None)
    assert not report.plot_path.exists()
    report.on_log(trainer_args, state_at(2), control, logs={"loss": 0.4})
    assert report.plot_path.exists()
    report.on_log(trainer_args, state_at(2), control, logs={"eval_loss": 1.0, "epoch": 0.1})  # a separate line
    report.on_log(trainer_args, state_at(2), control, logs={"train_runtime": 1.0, "train_loss": 1.0})  # the summary
    report.on_log(trainer_args, state_at(3, main=False), control, logs={"loss": 0.4})  # another process
    first, second, evaluation = read_jsonl(tmp_path / "metrics.jsonl")
    assert evaluation == {"step": 2, "eval_loss": 1.0}
    assert abs(first.pop("time") - time.time()) < 60
    assert first == {"step": 1, "loss": 0.5, "reward": 0.25, "entropy": None, "correctness": None, "n": 3}
    assert second["step"] == 2 and second["loss"] == 0.4


def test_report_draws_at_the_end_and_resumes_where_the_checkpoint_was(tmp_path, trainer_args):
    control = TrainerControl()
    for step in range(1, 8):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "reward": 0.1})
    report = ReportCallback(tmp_path, plot_every=0)
    report.on_train_begin(trainer_args, state_at(5), control)
    report.on_log(trainer_args, state_at(6), control, logs={"reward": 0.9})
    assert [(r["step"], r["reward"]) for r in read_jsonl(tmp_path / "metrics.jsonl")][-2:] == [(5, 0.1), (6, 0.9)]
    assert not report.plot_path.exists()
    report.on_train_end(trainer_args, state_at(6), control)
    png_size(report.plot_path)


def test_a_picture_that_cannot_be_drawn_is_only_a_warning(tmp_path, trainer_args, caplog):
    (tmp_path / "training_curves.png").mkdir()  # so the picture cannot be written
    report = ReportCallback(tmp_path, plot_every=1)
    with caplog.at_level(logging.WARNING):
        report.on_log(trainer_args, state_at(1), TrainerControl(), logs={"reward": 0.9})
    assert "could not draw" in caplog.text
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def warnings_of(callback, trainer_args, caplog, series):
    caplog.clear()
    steps = []
    for step, (distinct, reward) in enumerate(series, start=1):
        before = len(caplog.records)
        logs = {"reward": reward} if distinct is None else {"distinct_plans": distinct, "reward": reward}
        callback.on_log(trainer_args, state_at(step), TrainerControl(), logs=logs)
        steps += [step] * (len(caplog.records) - before)
    return steps


def test_collapse_is_reported_while_the_reward_rises(trainer_args, caplog):
    healthy, collapsed = [(0.9, 0.3)] * 10, [(0.1, 0.5 + i / 100) for i in range(60)]
    assert warnings_of(CollapseWarning(), trainer_args, caplog, healthy + collapsed) == [20, 40, 60]
    message = caplog.records[0].getMessage()
    assert "\n" not in message and "10%" in message and "0.300" in message
    # no warning: few distinct plans without a rising reward, a rising reward with distinct plans, no metric
    assert warnings_of(CollapseWarning(), trainer_args, caplog, [(0.1, 0.5)] * 40) == []
    assert warnings_of(CollapseWarning(), trainer_args, caplog, [(0.9, i / 40) for i in range(40)]) == []
    assert warnings_of(CollapseWarning(), trainer_args, caplog, [(None, i / 40) for i in range(40)]) == []
    assert warnings_of(CollapseWarning(window=3), trainer_args, caplog, [(0.9, 0.1)] * 3 + [(0.1, 0.2)] * 3) == [6]


def test_steps_without_any_valid_plan_are_reported_once(trainer_args, caplog):
    def warned(series, cut_off=0.0):
        caplog.clear()
        callback = InvalidWarning()
        for step, rate in enumerate(series, start=1):
            logs = {"invalid_plan_rate": rate, "completions/clipped_ratio": cut_off}
            callback.on_log(trainer_args, state_at(step), TrainerControl(), logs=logs)
        return [record.getMessage() for record in caplog.records]

    (message,) = warned([1.0] * 5)
    assert "step 2" in message and "--adapter-path" in message and "cut off" not in message and "\n" not in message
    (message,) = warned([1.0, 1.0], cut_off=0.75)
    assert "75% of them were cut off: raise --max-completion-length" in message
    assert warned([1.0, 0.9, 1.0, 0.9]) == []


def stop_flags(stop, trainer_args, step=1):
    control = stop.on_step_end(trainer_args, state_at(step), TrainerControl())
    return control.should_save, control.should_training_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_for_a_checkpoint_the_second_interrupts(trainer_args, capfd, number):
    previous = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert stop.received is None and stop_flags(stop, trainer_args) == (False, False)
        os.kill(os.getpid(), number)
        assert stop.received is number
        assert stop_flags(stop, trainer_args) == (True, True)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is previous
    assert stop.received is number  # still known afterwards, for the exit code
    notice = capfd.readouterr().err
    assert notice.strip() == "saving a checkpoint after this step; press again to quit at once"


def test_a_signal_in_the_middle_of_logging_is_no_deadlock(trainer_args, capfd):
    """A signal may arrive while the main thread holds the locks of logging and of a stream."""
    stopped = 0
    for _ in range(20):
        with StopOnSignal() as stop:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
            until = time.monotonic() + 5
            while stop.received is None and time.monotonic() < until:
                logging.getLogger("test_report.noise").error("x" * 1000)
                print("y" * 1000, file=sys.stderr, flush=True)
            stopped += stop_flags(stop, trainer_args) == (True, True)
    assert stopped == 20
    assert capfd.readouterr().err.count("saving a checkpoint") == 20


def test_a_forked_child_still_dies_of_sigterm(trainer_args):
    """Data loader workers inherit the handler. They must still end, and must print nothing."""
    with StopOnSignal() as stop:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGINT)  # ignored: the parent decides
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert stop.received is None


def rank_loop(rank, store, trainer_args, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with StopOnSignal() as stop:
        for step in range(1, 4):
            if rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            saves, stops = stop_flags(stop, trainer_args, step)
            if stops:
                break
    dist.destroy_process_group()
    results.put((rank, step, saves))


def test_all_processes_stop_when_one_gets_the_signal(tmp_path, trainer_args):
    """Two gloo processes, of which only one receives the signal. If it stopped alone, the other would wait forever."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_loop, args=(rank, tmp_path / "store", trainer_args, results)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        assert sorted(results.get(timeout=60) for _ in ranks) == [(0, 2, True), (1, 2, True)]
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
