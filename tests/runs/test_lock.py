"""One run per output folder: real processes compete for the same one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, failure, run_script

from common.errors import UserError
from common.runs.folder import own_output_dir
from common.runs.lock import LOCK_FILE, only_run

HOLD = (
    "import sys, time; from pathlib import Path; from common.runs.lock import only_run\n"
    "with only_run(Path(sys.argv[1]), '--output-dir x'):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """(lock file, a process that holds it)."""
    lock = tmp_path / "run" / LOCK_FILE
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield lock, process
    process.kill()
    process.wait()


def test_the_second_run_stops_with_one_line_that_names_the_first(holder, tmp_path):
    lock, process = holder
    folder = lock.parent
    for script, more in (("grpo_training.py", ["--no-wandb"]), ("dummy_planner.py", ["--no-wandb"])):
        done = run_script(script, "--demo", "--output-dir", str(folder), *more)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert f"--output-dir {folder} is in use by" in line and f"process {process.pid} on " in line
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


def test_a_killed_run_leaves_no_lock(holder):
    lock, process = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock.exists(), "what it left"
    again, mine = only_run(lock, "--output-dir x"), f"process {os.getpid()} on"
    with only_run(lock, "--output-dir x"), pytest.raises(UserError, match=mine), again:
        pass
    assert not lock.exists()


def test_of_several_processes_of_one_run_the_first_alone_takes_it(holder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with only_run(holder[0], "--output-dir x"):
        pass
    assert holder[0].exists()


def test_nothing_is_left_of_a_run_that_was_refused(tmp_path):
    folder = tmp_path / "a" / "b"
    with own_output_dir(folder, overwrite=False, resume=False):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", "training_config.json"):
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match="already holds a run"), own_output_dir(folder, overwrite=False, resume=False):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "training_config.json"]


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path):
    def files() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}

    mine = [
        ".vimrc",
        ".notes.json.swp",
        ".cache/x",
        "a.tmp",
        ".saving-notes",
        "metrics.jsonl",
        "training_config.json",
        "checkpoint-1/README.md",
    ]
    left = [
        ".saving-ab12cd_9/adapter_model.safetensors", ".metrics.jsonl.4711.tmp", ".training_curves.png.12.tmp",
        ".training_config.json.k3_f9a0z.tmp", ".evaluation.json.k3_f9a0z", "checkpoint-1/.tmpn5Vye5",
    ]  # fmt: skip
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    before = files()
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with own_output_dir(tmp_path, overwrite=False, resume=True):
        assert files() == before | {LOCK_FILE}
    assert files() == before


def test_an_unfinished_merge_is_removed_and_the_model_it_had_moved_away_is_put_back(tmp_path):
    from common.merging.unfinished import MODEL, REPLACED, remove_unfinished_merges

    target = tmp_path / "merged"

    def work(name: str) -> Path:
        folder = tmp_path / name
        (folder / MODEL).mkdir(parents=True)
        (folder / REPLACED).mkdir()
        (folder / REPLACED / "config.json").write_text("old")
        return folder

    ours, others = work(".merging-merged-ab12cd_9"), work(".merging-merged-2-ab12cd_9")
    remove_unfinished_merges(target)
    assert (target / "config.json").read_text() == "old"
    assert not ours.exists() and others.exists(), "another target's"


def test_a_merge_and_a_file_of_answers_are_held_too(adapter, server, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"question": "a"}\n')
    with only_run(tmp_path / f".merged{LOCK_FILE}", "x"), only_run(tmp_path / f".out.jsonl{LOCK_FILE}", "x"):
        done = run_script(
            "merge_and_push.py", "--adapter-path", str(adapter), "--repo-name", "a/b", "--no-push",
            "--local-save-path", str(tmp_path / "merged"),
        )  # fmt: skip
        assert done.returncode == 2 and "merged is in use by" in done.stderr and len(done.stderr.splitlines()) == 1
        code, line = failure(server, "--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--no-probe")
        assert code == 2 and "out.jsonl is in use by" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
