"""SIGKILL at random and at chosen moments of every script; then the command that continues, and its outcome.

After each kill, no process remains, and every file with a final name is complete. Only the last line of a JSON Lines
file may be cut off. At most `save_steps` steps are lost. In the end the outcome equals that of the uninterrupted run, with
weights equal bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forks import SECONDS, Forks, Run, Trigger
from misbehaving import MisbehavingServer, hang

from common.runs.checkpoints import complete_checkpoints

from .outcomes import (
    batch_outcome,
    board_outcome,
    broken_merge,
    broken_run,
    difference,
    grpo_outcome,
    merge_outcome,
    sft_outcome,
)
from .stage import PLANTED, Stage

MOST = (1, 4, 12, 24)  # kills of one run, unless it comes to its end before
SHORT = 0.35  # of a run: most kills come within this first part of what it still has to do, so that more of them fit
LONG_SHARE = 0.3  # of the kills may come anywhere
ROOMS = (0, 10, 2_000, 40_000, 150_000, 400_000, 2_000_000)  # bytes; the larger ones are met by weights
SMALL_FILES = re.compile("jsonl|answers|evaluation|config|^rename$")  # changes after which small files are written
TORCHRUN_SECONDS = 30  # from torchrun's SIGTERM to its SIGKILL


@dataclass
class Subject:
    """A command that is killed.

    Attributes:
        name: for the counts.
        script: its file.
        first: returns the flags that start it, for a given folder.
        again: returns the flags that continue it after a kill; None if the first command is repeated.
        outcome: returns everything that must be equal in the end, for a given folder.
        broken: yields what is wrong directly after a kill, for a given folder.
        prepare: fills the folder before the first start.
        ranks: number of processes.
        weight: its part of the kills, relative to the other subjects.
        after: names of the subjects whose reference runs it starts from.
        patterns: regular expressions for changes in the folder at which a kill is aimed.
    """

    name: str
    script: str
    first: Callable[[Path], list[str]]
    outcome: Callable[[Path], Any]
    broken: Callable[[Path], Iterator[str]]
    again: Callable[[Path], list[str]] | None = None
    prepare: Callable[[Path], object] = lambda folder: folder.mkdir()
    ranks: int = 1
    weight: float = 1.0
    after: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ("",)
    seconds: float = 0.0
    expected: Any = None
    changes: dict[str, int] = field(default_factory=dict)


def campaign(stage: Stage, only: str = "", kills: int | None = None) -> None:
    """Kill until the time is over, or `kills` times. `only` is searched in the names of subjects."""
    place = stage.folder / "kill"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    from . import served

    with (
        slow_server() as url,
        Forks(place / "logs", PLANTED) as forks,
        served.all_subjects(stage, place) as on_vllm,
    ):
        everyone = [*all_subjects(stage, place, url), *on_vllm]
        subjects = [subject for subject in everyone if re.search(only, subject.name)]
        while stage.time_left() and (kills is None or stage.counts["kills"] < kills):
            stage.dice.shuffle(subjects)
            subject = min(subjects, key=lambda each: stage.counts[f"kills of: {each.name}"] / each.weight)
            ready(stage, forks, place, subject, everyone)
            left = max(MOST) if kills is None else kills - stage.counts["kills"]
            one_life(stage, forks, place, subject, most=min(left, stage.dice.choice(MOST)))


def ready(stage: Stage, forks: Forks, place: Path, subject: Subject, everyone: Sequence[Subject]) -> None:
    """Make the reference runs that a subject needs; its own comes last."""
    for name in subject.after:
        ready(stage, forks, place, next(each for each in everyone if each.name == name), everyone)
    if subject.expected is None:
        reference(stage, forks, place, subject)


def reference(stage: Stage, forks: Forks, place: Path, subject: Subject) -> None:
    """Run a subject without a kill. Store its outcome, its duration and its changes."""
    folder = place / f"reference-{subject.name.replace(' ', '-')}"
    subject.prepare(folder)
    subject.first(folder)  # makes the model and the questions, which is no part of the run's time
    log = place / f"changes-{folder.name}"
    started = time.monotonic()
    run = forks.start(subject.script, *subject.first(folder), trigger=Trigger(folder, log=log), ranks=subject.ranks)
    code = run.wait()
    assert code == 0, f"{subject.name} fails without a kill: {run.tail()}"
    subject.seconds = time.monotonic() - started
    subject.expected = subject.outcome(folder)
    text = log.read_text().splitlines() if log.exists() else []
    subject.changes = {pattern: sum(bool(re.search(pattern, line)) for line in text) for pattern in subject.patterns}
    for problem in subject.broken(folder):
        stage.fails(f"{subject.name} without a kill: {problem}")
    print(f"{subject.name}: {subject.seconds:.1f} s, {len(text)} changes", flush=True)


def one_life(stage: Stage, forks: Forks, place: Path, subject: Subject, most: int) -> None:
    """Start a run, kill it up to `most` times, continue it to the end, and compare the outcome."""
    number = stage.counts["runs"] + 1
    stage.counts["runs"] += 1
    folder = place / f"{number:04d}-{subject.name.replace(' ', '-')}"
    subject.prepare(folder)
    found: list[str] = []
    history: list[str] = []
    try:
        live(stage, forks, subject, folder, most, found, history)
    except (AssertionError, TimeoutError, OSError, ValueError, KeyError) as error:
        found.append(f"{type(error).__name__}: {error}")
    print(f"{folder.name}: {'; '.join(history)}", flush=True)
    for problem in found:
        stage.fails(f"{subject.name}, {folder.name}: {problem}")
    if not found:
        shutil.rmtree(folder)


def live(
    stage: Stage, forks: Forks, subject: Subject, folder: Path, most: int, found: list[str], history: list[str]
) -> None:
    """One life of a subject in a folder. Append what is wrong to `found`, and each kill to `history`."""
    started = ended = False
    for _ in range(most):
        how, trigger, moment = aim(stage, subject, folder)
        before = state(folder)
        run = start(forks, subject, folder, started, trigger)
        if moment is not None and not run.ended(moment):
            run.kill(which=stage.dice.sample(run.pids, stage.dice.randint(1, len(run.pids))))
        code = finish(stage, run)
        started = True
        history.append(f"{how}: {code}")
        if code >= 0:  # the run was already finished, or ended before the moment of the kill
            if code != 0:
                found.append(f"exit code {code} without a kill: {run.tail()}")
            stage.counts["runs that ended before their kill"] += 1
            ended = True
            break
        stage.counts["kills"] += 1
        stage.counts[f"kills of: {subject.name}"] += 1
        stage.counts[f"kills {how.split(' ')[0]}"] += 1
        stage.counts["kills before the run had changed anything"] += state(folder) == before
        found += [f"after {how}: {problem}" for problem in subject.broken(folder)]
        found += [f"after {how}: process {pid} is left" for pid in run.left()]
    if not ended:
        run = start(forks, subject, folder, started, None)
    if run.wait() != 0:
        found.append(f"does not go on: {run.tail()}")
    else:
        found += difference(subject.expected, subject.outcome(folder))
        found += [f"left behind: {path.name}" for path in folder.rglob(".*") if path.name.startswith(".")]


def state(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of everything in a folder."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def aim(stage: Stage, subject: Subject, folder: Path) -> tuple[str, Trigger | None, float | None]:
    """Choose the next kill: (description, trigger, seconds after the start)."""
    kind = stage.dice.choice(("at random", "before", "within"))
    pattern = stage.dice.choice(subject.patterns)
    changes = subject.changes[pattern]
    part = 1.0 if stage.dice.random() < LONG_SHARE else SHORT
    if kind == "at random" or not changes:
        moment = stage.dice.uniform(0, max(0.7 * part, SHORT) * subject.seconds)
        return f"at {moment:.1f} s", None, moment
    # Early changes are chosen more often, because after a first kill fewer changes remain.
    last = max(1, round(part * changes))
    number = min(stage.dice.randint(1, last), stage.dice.randint(1, last))
    if kind == "before":
        return f"before change {number} of '{pattern}'", Trigger(folder, pattern, number), None
    room = stage.dice.choice(ROOMS[:3] if SMALL_FILES.search(pattern) else ROOMS)
    return f"within {room} bytes of change {number} of '{pattern}'", Trigger(folder, pattern, number, room), None


def start(forks: Forks, subject: Subject, folder: Path, started: bool, trigger: Trigger | None) -> Run:
    """Start a run. After a kill, continue it: with --resume, or as the script's error message says."""
    first = subject.first(folder)
    if not started or subject.again is None:
        return forks.start(subject.script, *first, trigger=trigger, ranks=subject.ranks)
    # The script itself decides whether it can resume. If not, its message is checked and followed.
    if complete_checkpoints(folder):
        return forks.start(subject.script, *subject.again(folder), trigger=trigger, ranks=subject.ranks)
    told = forks.start(subject.script, *subject.again(folder))
    code = told.wait()
    text = told.text()
    assert code == 2 and "start anew" in text, f"{code}: {text}"
    return forks.start(subject.script, *first, "--overwrite", trigger=trigger, ranks=subject.ranks)


def finish(stage: Stage, run: Run) -> int:
    """Wait for the end. Where one of several processes fails, do as torchrun: tell the others to end, then kill them."""
    end = time.monotonic() + SECONDS
    while len(run.pids) > 1 and not any(run.codes.values()) and time.monotonic() < end:
        if run.ended(0.5):
            break
    if any(run.codes.values()) and not run.ended(0):
        run.kill(signal.SIGTERM)
        if not run.ended(TORCHRUN_SECONDS):
            stage.counts["ranks that had to be killed as another was"] += 1
            run.kill()
    code = run.wait()
    killed = [number for number in run.codes.values() if number < 0]
    return killed[0] if killed else code


# ------------------------------------------------------------------------------------------------- what is killed


def all_subjects(stage: Stage, place: Path, url: str) -> Iterator[Subject]:
    """Yield each subject once. The others start from the reference run of the first one."""
    trained = place / "reference-GRPO"
    resume = ["--resume", "--output-dir"]
    aimed = ("", r"/checkpoint-", r"\.jsonl", r"/\.saving-|rename", r"training_config")
    run: dict[str, Any] = {
        "broken": broken_run, "again": lambda folder: [*resume, str(folder)], "patterns": aimed,
    }  # fmt: skip
    yield Subject("GRPO", "grpo_training.py", stage.grpo, grpo_outcome, weight=4, **run)
    yield Subject(
        "GRPO worker on a server", "grpo_training.py", lambda folder: stage.grpo(folder, "--worker-url", url),
        grpo_outcome, weight=2, **run,
    )  # fmt: skip
    yield Subject("GRPO two ranks", "grpo_training.py", stage.grpo, grpo_outcome, ranks=2, weight=0.7, **run)
    yield Subject("SFT", "dummy_planner.py", stage.sft, sft_outcome, weight=3, **run)

    def board(folder: Path, source: Path) -> list[str]:
        return ["--output-dir", str(folder), "--eval-only", "--eval-samples", "1000", "--eval-dataset", str(source)]

    scored: dict[str, Any] = {
        "outcome": board_outcome, "broken": broken_run, "prepare": lambda folder: shutil.copytree(trained, folder),
        "patterns": ("", "evaluation"), "after": ("GRPO",),
    }  # fmt: skip
    yield Subject("scoreboard", "grpo_training.py", lambda folder: board(folder, stage.held_out), **scored)
    yield Subject(
        "scoreboard of many questions", "grpo_training.py", lambda folder: board(folder, stage.many_held_out), **scored
    )

    def merge(folder: Path) -> list[str]:
        return [
            "--adapter-path", str(trained), "--local-save-path", str(folder / "merged"), "--repo-name", "user/planner",
            "--no-push", "--max-shard-size", "5MB",
        ]  # fmt: skip

    yield Subject("merge", "merge_and_push.py", merge, merge_outcome, broken_merge,
                  patterns=("", "model", "rename"), weight=2, after=("GRPO",))  # fmt: skip
    yield Subject(
        "merge over an older one", "merge_and_push.py", lambda folder: [*merge(folder), "--dtype", "bfloat16", "--overwrite"],
        merge_outcome, broken_merge, patterns=("", "rename"), after=("merge",),
        prepare=lambda folder: shutil.copytree(place / "reference-merge", folder),
    )  # fmt: skip

    def batch(folder: Path) -> list[str]:
        source = place / "questions.jsonl"
        if not source.exists():
            source.write_text("".join(json.dumps({"question": f"Question {n}?"}) + "\n" for n in range(60)))
        return [
            "--base-url", url, "--input", str(source), "--output", str(folder / "answers.jsonl"), "--concurrency", "6",
        ]  # fmt: skip

    yield Subject(
        "batch answering", "inference_vllm.py", batch, batch_outcome, broken_run, patterns=("", "answers"), weight=4,
    )  # fmt: skip


@contextmanager
def slow_server() -> Iterator[str]:
    """The address of a server that answers slowly, so that there is time for a kill."""
    server = MisbehavingServer()
    server.fault = hang(0.03)
    yield server.url
    server.close()
