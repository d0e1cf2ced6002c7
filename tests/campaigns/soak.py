"""Long runs: ten thousand questions to a server that misbehaves at random, and three hundred training steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from forks import Forks, Run
from misbehaving import FAULTS, MisbehavingServer

from common.reports.jsonl import read_jsonl

from .stage import PLANTED, Stage

QUESTIONS, KILLS, STEPS = 10_000, 5, 300
FAULTY = 0.01  # probability of each fault, per request
BETWEEN = (
    "status 429", "status 500", "status 503", "an error with status 200", "a page", "half a page", "no choices", "no HTTP",
    "hung up",
)  # fmt: skip
GROWTH = 1.15  # limit for the largest memory of the last third, relative to that of the second third

SLOWER = 1.5  # limit for the CPU time per step of the last third, likewise; what the planner writes changes it too


class Use(NamedTuple):
    """What a process uses at a time (seconds since 1970): memory in MB, and CPU seconds so far."""

    at: float
    memory: int
    cpu: float


def campaign(stage: Stage, only: str = "", questions: int = QUESTIONS, kills: int = KILLS, steps: int = STEPS) -> None:
    """Run both long runs. They do not depend on the campaign's minutes."""
    place = stage.folder / "soak"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with Forks(place / "logs", PLANTED) as forks:
        if re.search(only, "batch"):
            answer_all(stage, forks, place, questions, kills)
        if re.search(only, "training"):
            train_long(stage, forks, place, steps)


def answer_all(stage: Stage, forks: Forks, place: Path, questions: int, kills: int) -> None:
    """Answer a file while the server fails at random. Kill and continue; repeat failed questions until all succeed."""
    source, output = place / "in.jsonl", place / "out.jsonl"
    source.write_text("".join(json.dumps({"question": f"Question {n}?", "id": n}) + "\n" for n in range(questions)))
    server = MisbehavingServer()
    dice_lock = threading.Lock()

    def fault(handler: Any, request: dict[str, Any]) -> bool:
        if not request or request["max_tokens"] <= 1:
            return False
        with dice_lock:
            number = int(stage.dice.random() / FAULTY)
            if len(server.requests) > 1000:
                server.requests.clear()
            stage.counts["soak: requests"] += 1
        if number < len(BETWEEN):
            with dice_lock:
                stage.counts[f"soak: answered with {BETWEEN[number]}"] += 1
            return FAULTS[BETWEEN[number]](handler, request)
        if number == len(BETWEEN):  # a late reply
            with dice_lock:
                stage.counts["soak: answered late"] += 1
            time.sleep(1.0)
        return False

    server.fault = fault
    flags = [
        "--base-url", server.url, "--input", str(source), "--output", str(output), "--concurrency", "64", "--no-probe",
        "--timeout", "30", "--no-structured",
    ]  # fmt: skip
    started = time.monotonic()
    marks = sorted(stage.dice.sample(range(questions // 10, questions), kills))
    for mark in marks:
        run = forks.start("inference_vllm.py", *flags)
        while not run.ended(0.2):
            if output.exists() and output.read_bytes().count(b"\n") >= mark:
                run.kill()
                run.wait()
                stage.counts["soak: kills"] += 1
    for attempt in range(1, 9):
        run = forks.start("inference_vllm.py", *flags)
        with watched(run) as use:
            code = run.wait(3600)
        rows = read_jsonl(output)
        failed = sum(row["error"] is not None for row in rows)
        print(f"batch: attempt {attempt}, exit code {code}, {failed} of {len(rows)} failed", flush=True)
        if [row["line"] for row in rows] != list(range(1, questions + 1)):
            stage.fails(f"soak: {len(rows)} answers to {questions} questions, or not in their order")
        if code not in (0, 1) or "Traceback" in run.text():
            stage.fails(f"soak: exit code {code}: {run.tail()}")
        if code != 1:
            break
    seconds = time.monotonic() - started
    stage.counts["soak: questions answered"] = sum(row["error"] is None for row in read_jsonl(output))
    if stage.counts["soak: questions answered"] != questions:
        stage.fails(f"soak: {stage.counts['soak: questions answered']} of {questions} answered")
    tell(stage, "batch", use, seconds)
    server.close()


def train_long(stage: Stage, forks: Forks, place: Path, steps: int) -> None:
    """Train, and check the memory and the CPU time per step, which other processes change less than the time."""
    folder = place / "run"
    flags = [*stage.grpo(folder), "--max-steps", str(steps), "--save-steps", str(max(1, steps // 3))]
    started = time.monotonic()
    run = forks.start("grpo_training.py", *flags)
    with watched(run) as use:
        code = run.wait(7200)
    if code != 0:
        stage.fails(f"soak: training ended with {code}: {run.tail()}")
        return
    ends = [row["time"] for row in read_jsonl(folder / "metrics.jsonl")]
    stage.counts["soak: training steps"] = len(ends)
    if (third := len(ends) // 3) >= 10:
        used = [next((each.cpu for each in use if each.at >= end), use[-1].cpu) for end in ends]
        first, second, last = ((used[n + third - 1] - used[n]) / (third - 1) for n in (0, third, len(used) - third))
        print(f"training: {first:.2f}, {second:.2f}, {last:.2f} s of CPU per step in its thirds", flush=True)
        if last > SLOWER * second:
            stage.fails(f"soak: steps became slower: {second:.2f} to {last:.2f} s of CPU")
    tell(stage, "training", use, time.monotonic() - started)


def tell(stage: Stage, name: str, use: list[Use], seconds: float) -> None:
    """Print the development of memory use. Growth is a finding."""
    memory = [each.memory for each in use]
    third = len(memory) // 3
    if third < 10:  # too few values for a conclusion
        return
    second, last = max(memory[third : 2 * third]), max(memory[2 * third :])
    print(f"{name}: {seconds:.0f} s, memory {second:.0f} MB in the second third, {last:.0f} MB in the last", flush=True)
    if last > GROWTH * second:
        stage.fails(f"soak: memory of {name} grew from {second} to {last} MB")


@contextmanager
def watched(run: Run) -> Iterator[list[Use]]:
    """Collect what a run uses, twice a second."""
    found: list[Use] = []
    over = threading.Event()

    def look() -> None:
        process = Path(f"/proc/{run.pids[0]}")
        ticks = os.sysconf("SC_CLK_TCK")
        while not over.wait(0.5):
            try:
                held = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
                spent = (process / "stat").read_text().rpartition(")")[2].split()[11:13]  # utime, stime
            except (OSError, StopIteration):  # the process has ended
                continue
            found.append(Use(time.time(), int(held.split()[1]) // 1024, sum(map(int, spent)) / ticks))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        over.set()
        looking.join()
