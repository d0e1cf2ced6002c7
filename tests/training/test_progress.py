"""Progress on the terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import termios

import pytest
from conftest import state_at
from transformers import TrainerControl

from common.training.progress import ProgressCallback


def run_steps(callback, trainer_args, steps, max_steps, log_every=1):
    control = TrainerControl()
    callback.on_train_begin(trainer_args, state_at(0, max_steps), control)
    for step in range(1, steps + 1):
        control.should_log = step % log_every == 0
        callback.on_step_end(trainer_args, state_at(step, max_steps), control)
        if control.should_log:
            logs = {"reward": 0.5, "correctness": 0.25, "invalid_plan_rate": 0.125, "decomposition_rate": 1.0}
            callback.on_log(trainer_args, state_at(step, max_steps), control, logs=logs)
    callback.on_log(trainer_args, state_at(steps, max_steps), control, logs={"train_runtime": 1.0})
    callback.on_train_end(trainer_args, state_at(steps, max_steps), control)


def test_progress_without_a_terminal_is_a_few_plain_lines(trainer_args, capsys):
    run_steps(ProgressCallback(), trainer_args, 25, 25)
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert "reward 0.500  correct 25%  invalid 12%  decomposed 100%" in lines[0]
    assert "s/step" in lines[0] and "left" in lines[0]
    # stopped early, and steps without a log
    run_steps(ProgressCallback(), trainer_args, 13, 100, log_every=5)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/100", "11/100", "13/100"]


@pytest.mark.parametrize("rows_and_columns", [(24, 80), (0, 0)])
def test_progress_on_a_terminal_is_one_bar(trainer_args, rows_and_columns):
    pid, terminal = pty.fork()
    if pid == 0:  # a child of this process: importing transformers again would take seconds
        termios.tcsetwinsize(2, rows_and_columns)
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", closefd=False)  # noqa: PTH123, SIM115
        run_steps(ProgressCallback(), trainer_args, 5, 5)
        sys.stderr.flush()
        os._exit(0)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux reports the end of a terminal's output
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    last = shown.decode().strip().split("\r")[-1]
    assert "5/5" in last and "reward 0.500" in last and "decomposed 100%" in last
    assert shown.count(b"\n") == 1  # the bar redraws one line
