"""The clock of a step's parts counts no time twice and loses none."""

from __future__ import annotations

import time

import pytest

from common.reports.step_clock import PARTS, StepClock, breakdown_rows


def test_parts_and_rest_sum_to_the_time_passed_and_nested_time_counts_once():
    started = time.perf_counter()
    clock = StepClock()
    clock.add("planner_seconds", 100.0)
    clock.restart()
    with clock.part("gradient_seconds", without=["inputs"]):
        with clock.part("inputs"), clock.part("planner_seconds"):
            time.sleep(0.05)
        time.sleep(0.02)
    clock.add("worker_seconds", 0.0)
    taken = clock.take()
    passed = time.perf_counter() - started
    assert list(taken) == list(PARTS)
    assert taken["planner_seconds"] >= 0.05 and 0.02 <= taken["gradient_seconds"] < taken["planner_seconds"]
    assert sum(taken.values()) <= passed
    again = clock.take()
    assert sum(again.values()) < 0.02 and again["planner_seconds"] == 0


def test_what_is_saved_between_two_steps_is_a_part_of_its_own_and_what_comes_before_the_first_is_none():
    clock = StepClock()
    clock.add("embedding_seconds", 100.0)  # of a scoreboard before training
    time.sleep(0.05)  # a checkpoint is loaded
    clock.begin()
    first = clock.take()
    assert sum(first.values()) < 0.05
    time.sleep(0.05)  # metrics are written, a checkpoint is saved
    for _ in range(2):  # micro-batches of one step
        clock.begin()
        time.sleep(0.01)
    second = clock.take()
    assert second["saving_seconds"] >= 0.05 and 0.02 <= second["rest_seconds"] < 0.05


def test_a_part_that_fails_still_counts():
    clock = StepClock()
    with pytest.raises(RuntimeError), clock.part("planner_seconds"):
        raise RuntimeError
    assert clock.take()["planner_seconds"] > 0


def test_breakdown_averages_the_steps_that_have_one():
    step = {"planner_seconds": 6.0, "worker_seconds": 2.0, "embedding_seconds": 0.0, "gradient_seconds": 1.0}
    rows = breakdown_rows([{**step, "rest_seconds": 1.0}, {**step, "worker_seconds": None, "rest_seconds": 3.0}, {}])
    assert [row["seconds"] for row in rows] == ["0.00", "6.00", "1.00", "0.00", "1.00", "2.00"]
    assert rows[1]["share"] == "60.0%"
    assert breakdown_rows([{"loss": 1.0}]) == []
