"""Faults of the machine, the network and servers during a run; then the command that the run has printed to continue.

Each fault must end a run with one line and the right exit code, or the run must survive it. Older files are unchanged.
The continued run must give the same result as an undisturbed one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forks import Forks, Run, Trigger
from misbehaving import MisbehavingServer, hang

from . import kill, networks, served
from .cgroup import memory_limit, place_for_groups
from .kill import Subject
from .outcomes import difference
from .stage import PLANTED, Stage

DISK = 96  # MB; more than any subject needs
KILLED = -9  # by the kernel
ABORTED = -6  # by a library written in Rust, whose allocator gives up


@dataclass(frozen=True)
class Case:
    """One fault for one subject.

    Attributes:
        name: for the counts.
        subject: the command that is disturbed.
        meet: starts the run with the fault in the given folder, waits for its end, and returns the run.
        codes: allowed exit codes, besides 0 if the fault may be survived.
        survived: whether the run may survive the fault.
        heal: ends the fault.
        on_disk: whether the folder is on a small file system of its own.
        same: whether the outcome must equal that of an undisturbed run. Samples whose worker failed are masked.
        but: part of the outcome that may differ all the same.
        goes_on: whether the command that continues it is tried; else it must have come to its end.
        more: whether the same fault is to be tried again, at another moment of the run.
    """

    name: str
    subject: Subject
    meet: Callable[[Path], Run]
    codes: tuple[int, ...] = (1,)
    survived: bool = True
    heal: Callable[[Path], None] = lambda folder: None
    on_disk: bool = False
    same: bool = True
    but: str = ""
    goes_on: bool = True
    more: Callable[[], bool] = lambda: False


def campaign(stage: Stage, only: str = "", faults: int | None = None) -> None:
    """Try every fault with every subject, until the time is over or `faults` were tried.

    A disk is filled at each change of the output folder in turn. `only` is searched in "FAULT: SUBJECT".
    """
    place = stage.folder / "fault"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    server = MisbehavingServer()
    server.fault = hang(networks.LATE)
    with (
        Forks(place / "logs", PLANTED) as forks,
        small_disk(place / "disk") as disk,
        served.all_subjects(stage, place) as on_vllm,
    ):
        if place_for_groups() is None:
            print("no cgroup can be made here: its memory limit is left out", flush=True)
        if disk is None:
            print("no file system can be mounted here: full and read-only disks are left out", flush=True)
        subjects = list(kill.all_subjects(stage, place, server.url))
        alone = [each for each in subjects if each.ranks == 1]
        every = [
            *all_cases(stage, forks, place, alone, server, disk),
            # A run that ends for its server saves the step that it has reached, which is one more checkpoint.
            *(Case(f"server killed: {each.name}", each, served.server_killed(forks, each), but="/files")
              for each in on_vllm if "own" in each.name),
        ]  # fmt: skip
        cases = [case for case in every if re.search(only, case.name)]
        stage.dice.shuffle(cases)
        seen: Counter[str] = Counter()
        # Each fault once, then each once more, with another subject while there is one.
        cases.sort(key=lambda case: seen.update([case.name]) or seen[case.name])
        kinds: Counter[str] = Counter()
        cases.sort(key=lambda case: kinds.update([kind(case)]) or kinds[kind(case)])
        left = deque(cases)
        while left and stage.time_left() and (faults is None or stage.counts["faults"] < faults):
            case = left.popleft()
            kill.ready(stage, forks, place, case.subject, subjects)
            one_case(stage, forks, place, case, disk)
            if case.more():
                left.append(case)
        if left:
            print(f"not tried, or not at every moment: {', '.join(case.name for case in left)}", flush=True)
        if re.search(only, "Hub"):
            kill.ready(stage, forks, place, next(each for each in subjects if each.name == "merge"), subjects)
            networks.hub_breaks(stage, place)
    server.close()


def kind(case: Case) -> str:
    """The fault of a case, without its subject."""
    return case.name.partition(":")[0]


def one_case(stage: Stage, forks: Forks, place: Path, case: Case, disk: Path | None) -> None:
    """Run a subject with a fault, check how it ended, continue it, and compare the outcome."""
    stage.counts["faults"] += 1
    stage.counts[f"faults: {kind(case)}"] += 1
    name = f"{stage.counts['faults']:04d}-{case.subject.name.replace(' ', '-')}"
    folder = (disk if case.on_disk and disk is not None else place) / name
    case.subject.prepare(folder)
    found: list[str] = []
    try:
        run = case.meet(folder)
        found += misfit(case, run)
        print(f"{case.name}, {name}: exit code {run.wait()}", flush=True)
        stage.counts["faults survived" if run.wait() == 0 else "faults told"] += 1
        case.heal(folder)
        found += list(case.subject.broken(folder))
        found += [f"process {pid} is left" for pid in run.left()]
        on = kill.start(forks, case.subject, folder, started=True, trigger=None) if case.goes_on else run
        if on.wait() != 0:
            found.append(f"does not go on: {on.tail()}")
        elif case.same:
            other = difference(case.subject.expected, case.subject.outcome(folder))
            found += [line for line in other if not case.but or not line.startswith(case.but)]
    except (AssertionError, TimeoutError, OSError, ValueError, KeyError) as error:
        found.append(f"{type(error).__name__}: {error}")
    finally:
        case.heal(folder)
    for problem in found:
        stage.fails(f"{case.name}, {name}: {problem}")
    if not found or folder.parent == disk:
        shutil.rmtree(folder, ignore_errors=True)


def misfit(case: Case, run: Run) -> Iterator[str]:
    """Yield what is wrong with the end of a run."""
    code, text = run.wait(), run.text()
    script = case.subject.script
    told = [line for line in text.splitlines() if line.startswith(f"{script}: error:")]
    if "Traceback" in text:
        yield f"a traceback: {run.tail()}"
    elif code == 0 and case.survived:
        return
    elif code not in case.codes:
        yield f"exit code {code}: {run.tail()}"
    elif code in (KILLED, ABORTED):  # nothing could be said
        return
    elif len(told) != 1 and "failed, to be asked again" not in text and " of them: " not in text:
        yield f"{len(told)} lines of error: {run.tail()}"
    elif any("--debug shows where" in line for line in told):
        yield f"an unforeseen error: {told[0]}"


def all_cases(
    stage: Stage, forks: Forks, place: Path, subjects: list[Subject], server: MisbehavingServer, disk: Path | None
) -> Iterator[Case]:
    """Yield every fault for every subject that it can disturb."""

    def begin(subject: Subject, **options: Any) -> Callable[[Path], Run]:
        def meet(folder: Path) -> Run:
            run = forks.start(subject.script, *subject.first(folder), **options)
            run.wait()
            return run

        return meet

    for subject in subjects:
        if disk is not None:
            yield disk_full(stage, forks, subject, disk)
            yield Case(
                f"read-only disk: {subject.name}", subject, read_only(forks, subject, disk), codes=(1, 2), survived=False,
                heal=lambda folder: remount(disk, "rw"), on_disk=True,
            )  # fmt: skip
        for handles in (16, 24, 40):
            yield Case(f"file handles used up: {subject.name}", subject,
                       begin(subject, limits={"RLIMIT_NOFILE": handles}), codes=(1, 2))  # fmt: skip
        for megabytes in (20, 60, 150, 400):
            yield Case(f"memory limit: {subject.name}", subject,
                       begin(subject, limits={"RLIMIT_AS": megabytes << 20}), codes=(1, ABORTED))  # fmt: skip
            if place_for_groups() is not None:
                yield Case(f"memory limit of a cgroup: {subject.name}", subject, grouped(forks, subject, megabytes),
                           codes=(KILLED, 1))  # fmt: skip
        yield Case(f"clock set back: {subject.name}", subject, begin(subject, clock=86_400.0), codes=())
        yield Case(f"no permission: {subject.name}", subject, forbidden(forks, subject), codes=(1, 2), survived=False,
                   heal=lambda folder: folder.chmod(0o755))  # fmt: skip
        if "server" in subject.name or "batch" in subject.name:
            for name, fault in networks.network_faults(server).items():
                yield Case(f"network, {name}: {subject.name}", subject, networks.in_trouble(forks, subject, server, fault),
                           codes=(1, 2), heal=lambda folder: networks.heal(server), same="batch" in subject.name)  # fmt: skip
        if subject.name in ("GRPO", "SFT"):
            for starts in (False, True):
                yield Case(
                    f"W&B hangs {'after the start' if starts else 'at once'}: {subject.name}", subject,
                    networks.wandb_hangs(place, subject, starts), codes=(), goes_on=False, but="/files",
                )  # fmt: skip


def disk_full(stage: Stage, forks: Forks, subject: Subject, disk: Path) -> Case:
    """A full disk at each change of the output folder that an undisturbed run makes, in random order."""
    filler = disk / "filler"
    numbers: list[int] | None = None  # not yet tried

    def meet(folder: Path) -> Run:
        nonlocal numbers
        if numbers is None:  # how many changes there are is known only after the reference run
            numbers = list(range(1, max(1, subject.changes[""]) + 1))
            stage.dice.shuffle(numbers)
        trigger = Trigger(folder, "", numbers.pop(), fill=filler)
        run = forks.start(subject.script, *subject.first(folder), trigger=trigger)
        run.wait()
        return run

    return Case(f"disk full: {subject.name}", subject, meet, codes=(1, 2), heal=lambda folder: filler.unlink(missing_ok=True),
                on_disk=True, more=lambda: bool(numbers))  # fmt: skip


def grouped(forks: Forks, subject: Subject, megabytes: int) -> Callable[[Path], Run]:
    """Return a function that starts a run in a cgroup that may use this much memory more than the imports do."""

    def meet(folder: Path) -> Run:
        with memory_limit(megabytes) as group:
            run = forks.start(subject.script, *subject.first(folder), group=group)
            run.wait()
        return run

    return meet


def read_only(forks: Forks, subject: Subject, disk: Path) -> Callable[[Path], Run]:
    """Return a function that starts a run in a folder on a read-only disk."""

    def meet(folder: Path) -> Run:
        remount(disk, "ro")
        run = forks.start(subject.script, *subject.first(folder))
        run.wait()
        return run

    return meet


def forbidden(forks: Forks, subject: Subject) -> Callable[[Path], Run]:
    """Return a function that starts a run in a folder that it may read but not write."""

    def meet(folder: Path) -> Run:
        folder.chmod(0o555)
        run = forks.start(subject.script, *subject.first(folder), privileged=False)
        run.wait()
        return run

    return meet


@contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A small file system of its own; None if none can be mounted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "none", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False).returncode == 0
    except OSError:
        done = False
    try:
        yield place if done else None
    finally:
        if done:
            subprocess.run(["umount", "-l", str(place)], check=True)


def remount(disk: Path, mode: str) -> None:
    """Make a mounted disk read-only or writable. Files that are open for writing get some time to be closed."""
    for _ in range(50):
        if (
            subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], capture_output=True, check=False).returncode
            == 0
        ):
            return
        time.sleep(0.1)
    raise OSError(f"{disk} could not be mounted {mode}")
