"""Weights & Biases with the real library in offline mode: runs, messages and files.

The runs are in child processes, because wandb keeps global state, and because all output of a child can be read.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.reports.metrics import step_metrics
from common.reports.wandb_log import wandb_name

# Runs the function of this file that argv[1] names; the parent reads both output streams.
CHILD = "import sys; sys.path[:0] = ['.', 'tests', 'tests/reports']; import test_wandb_log; getattr(test_wandb_log, sys.argv[1])(*sys.argv[2:])"
# Children print this before the output under test, because imports may print something too.
MARK = "--- start ---\n"


def run_child(function, *arguments, home, **variables):
    """Run a function of this file without the user's keys and proxies. Returns (stdout, stderr)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and not k.lower().endswith("_proxy")}
    kept.pop("NETRC", None)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, function, *map(str, arguments)],
        cwd=ROOT,
        env={**kept, "HOME": str(home), **variables},
        stdin=subprocess.DEVNULL,  # a prompt would fail rather than wait
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(MARK)[-1], done.stderr.split(MARK)[-1]


def mark():
    for stream in (sys.stdout, sys.stderr):
        print(MARK, end="", file=stream, flush=True)


def history_of(run_dir):
    """The history rows in an offline run's .wandb file: {metric: value} per call of run.log.

    The file has LevelDB's log format: 32 KiB blocks of chunks (crc 4, length 2, type 1, data). A record is one chunk,
    or a first, middle and last chunks.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("*.wandb")
    content, position, data, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        if left_in_block < 7 or kind == 0:
            position += left_in_block
            continue
        data = (b"" if kind in {1, 2} else data) + content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in {1, 4}:
            record = Record.FromString(data)
            if record.HasField("history"):
                row = {}
                for item in record.history.item:
                    *outer, last = item.nested_key or [item.key]  # a dict arrives as one item per entry
                    place = row
                    for key in outer:
                        place = place.setdefault(key, {})
                    place[last] = json.loads(item.value_json)
                rows.append(row)
    return rows


def start_in_every_way(out, refused_port):
    """One line of JSON per case: mode, seconds, stderr. One child runs all cases, because imports are slow."""
    import contextlib
    import io
    import time

    import wandb

    from common.errors import UserError
    from common.reports.wandb_run import start_wandb

    key, closed = "a" * 40, f"http://127.0.0.1:{refused_port}"
    netrc = Path(out) / "netrc"
    netrc.write_text(f"machine 127.0.0.1:{refused_port}\n  login user\n  password {key}\n")
    cases = {
        "no key": ({}, "name"),
        "netrc, refused": ({"NETRC": str(netrc), "WANDB_BASE_URL": closed}, None),
        "key, refused": ({"WANDB_API_KEY": key, "WANDB_BASE_URL": closed}, "name"),
        "online, refused": ({"WANDB_API_KEY": key, "WANDB_BASE_URL": closed, "WANDB_MODE": "online"}, "name"),
        "key, proxy refused": ({"WANDB_API_KEY": key, "https_proxy": closed}, "name"),
        "bad key": ({"WANDB_API_KEY": "secret", "WANDB_BASE_URL": closed}, "name"),
        "offline": ({"WANDB_API_KEY": key, "WANDB_MODE": "offline"}, "name"),
        "disabled": ({"WANDB_MODE": "disabled"}, "name"),
        "bad mode": ({"WANDB_MODE": "sometimes"}, "name"),
    }
    mark()
    for case, (variables, name) in cases.items():
        os.environ.update(variables)
        wandb.teardown()
        output_dir, stderr, begun = Path(out) / case, io.StringIO(), time.monotonic()
        result = {"case": case}
        with contextlib.redirect_stderr(stderr):
            try:
                config = {"lr": 1e-5, "path": Path("/x"), "nested": {"t": (1, 2)}, "none": None}
                run = start_wandb("project", name, config, output_dir)
                result["mode"] = run and run.settings.mode
                if run:
                    result |= {"sync": run.settings.sync_dir, "config": dict(run.config)}
                    run.log({"a": 1})
                    run.finish()
            except UserError as error:
                result["error"] = str(error)
        result |= {"seconds": time.monotonic() - begun, "stderr": stderr.getvalue()}
        for variable in variables:
            del os.environ[variable]
        print(json.dumps(result))
    try:
        start_wandb("a/b", None, {}, out)
    except UserError as error:
        print(json.dumps({"case": "bad project", "error": str(error)}))


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    with socket.socket() as server:  # a port that was free a moment ago refuses connections
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    out, home = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("home")
    stdout, stderr = run_child("start_in_every_way", out, port, home=home)
    cases = {result["case"]: result for result in map(json.loads, stdout.splitlines())}
    return {"out": out, "home": home, "stderr": stderr, **cases}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no key", "no API key: set WANDB_API_KEY or run 'wandb login'"),
        ("netrc, refused", "Connection refused"),
        ("key, refused", "Connection refused"),
        ("online, refused", "Connection refused"),
        ("key, proxy refused", "Connection refused"),
        ("bad key", "no usable API key"),
        ("offline", "WANDB_MODE=offline"),
    ],
)
def test_offline_within_seconds_and_one_line_says_why(starts, case, reason):
    result = starts[case]
    assert result["mode"] == "offline" and result["seconds"] < 15
    (line,) = result["stderr"].splitlines()
    assert line.startswith("wandb: offline (") and reason in line and "secret" not in line
    assert f"wandb sync '{result['sync']}'" in line or line.endswith(f"wandb sync {result['sync']}")
    run_dir = Path(result["sync"])
    assert run_dir.parent == starts["out"] / case / "wandb" and list(run_dir.glob("*.wandb"))
    assert result["config"] == {"lr": 1e-5, "path": "/x", "nested": {"t": [1, 2]}, "none": None}


def test_disabled_means_silence(starts):
    assert starts["disabled"]["mode"] is None and starts["disabled"]["stderr"] == ""
    assert not (starts["out"] / "disabled").exists()


def test_bad_input_is_a_user_error_of_one_line(starts):
    for case, found in {"bad mode": "sometimes", "bad project": "a/b"}.items():
        assert found in starts[case]["error"] and "\n" not in starts[case]["error"]


def test_nothing_else_is_printed_or_left_in_the_home_directory(starts):
    assert starts["stderr"] == ""
    assert not (starts["home"] / ".netrc").exists() and not (starts["home"] / ".local").exists()


STEPS, BATCH, ROWS = 12, 10, 8


def sample(step, index):
    valid = index % 3 > 0
    return {
        "step": step,
        "question": f"question {step}-{index} 日本 \ud83d",
        "completion": "text of\nthe model",
        "plan": {"should_decompose": True, "subproblems": ["a", "b"], "plan": "é"} if valid else None,
        "solutions": ["1", "2"] if valid else [],
        "answer": None if index == 1 else "7",
        "gold": "7",
        "correct": index % 2 == 0,
        "reward": None if index == 0 else index / BATCH,
        "independence": float("nan"),
        "error": "worker failed" if index == 0 else None,
    }


def log_a_training(out, max_steps):
    """A run of `max_steps` steps that calls the callbacks as the Trainer does."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from common.reports.wandb_log import WandbCallback
    from common.reports.wandb_run import start_wandb

    args = TrainingArguments(output_dir=out, use_cpu=True, report_to=[])
    control = TrainerControl()
    run = start_wandb("project", "a run", {"lr": 1e-5}, out)
    assert run is not None
    callback = WandbCallback()  # uses the active run
    for step in range(1, STEPS + 1):
        state = TrainerState(global_step=step, max_steps=int(max_steps), logging_steps=1, is_world_process_zero=True)
        batch = [sample(step, index) for index in range(BATCH)]
        callback.add_samples(batch[:4])  # a reward function may be called several times a step
        callback.add_samples(batch[4:])
        logs = {"loss": 0.1, "reward": step / 10, "reward_std": 0.2, "learning_rate": 1e-5, "correctness": 0.5}
        logs |= {"independence": float("nan"), "token_efficiency": None, "completions/mean_length": 12.0}
        callback.on_log(args, state, control, logs=logs)
    callback.on_log(args, state, control, logs={"eval_reward": 0.7, "epoch": 1.0})
    callback.add_samples([sample(STEPS + 1, 5)])  # a step that was not logged before training ended
    callback.on_train_end(args, state, control)
    callback.on_log(args, state, control, logs={"train_runtime": 1.5, "train_loss": 0.1})
    callback.close()
    del os.environ["WANDB_DATA_DIR"]  # as in a new process
    return run.settings.sync_dir


def log_after_the_end(out):
    """Training with a run that is already finished, so that wandb raises at every call."""
    from transformers import TrainerControl, TrainerState

    from common.reports.wandb_log import WandbCallback
    from common.reports.wandb_run import start_wandb

    run = start_wandb("project", None, {}, out)
    callback = WandbCallback(run)
    run.finish()
    state = TrainerState(global_step=1, max_steps=2, logging_steps=1, is_world_process_zero=True)
    for _ in range(3):
        callback.add_samples([sample(1, 1)])
        callback.on_log(None, state, TrainerControl(), logs={"loss": 0.1})
    callback.on_train_end(None, state, TrainerControl())
    callback.close()
    try:
        WandbCallback()
    except ValueError as error:
        return str(error)


def log_all(out):
    mark()
    results = {max_steps: log_a_training(f"{out}/{max_steps}", max_steps) for max_steps in (STEPS, 300)}
    print("--- broken ---", file=sys.stderr, flush=True)
    print(json.dumps({**results, "broken": log_after_the_end(f"{out}/broken")}))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    stdout, stderr = run_child("log_all", tmp_path_factory.mktemp("out"), home=tmp_path_factory.mktemp("home"))
    return json.loads(stdout), *stderr.split("--- broken ---\n")


@pytest.fixture(params=[STEPS, 300])
def logged(logs, request):
    """(run directory, history rows, max_steps) of a short run, and of one long enough to bundle steps."""
    run_dir = Path(logs[0][str(request.param)])
    return run_dir, history_of(run_dir), request.param


def test_two_runs_print_two_lines(logs):
    """Both are from start_wandb; wandb itself prints nothing, and the callback gives no warning."""
    lines = logs[1].splitlines()
    assert len(lines) == 2 and all(line.startswith("wandb: offline") for line in lines)


def test_metrics_have_readable_names_and_one_x_axis(logged):
    _, history, _ = logged
    steps = [row for row in history if "train/loss" in row and "train/runtime" not in row]
    assert [row["train/global_step"] for row in steps] == list(range(1, STEPS + 1))
    assert (
        steps[2].items()
        >= {
            "train/learning_rate": 1e-5,
            "reward/mean": 0.3,
            "reward/std": 0.2,
            "correctness": 0.5,
            "completions/mean_length": 12.0,
        }.items()
    )
    assert not {"independence", "token_efficiency"} & set(steps[2])  # NaN and None give no point of a curve
    assert {"eval/reward": 0.7, "train/epoch": 1.0, "train/global_step": STEPS}.items() <= history[STEPS].items()
    assert history[-1]["train/runtime"] == 1.5


def test_rewards_of_each_batch_are_a_histogram(logged):
    _, history, _ = logged
    for row in history[:STEPS]:
        histogram = row["reward/distribution"]
        assert histogram["_type"] == "histogram" and sum(histogram["values"]) == BATCH - 1  # one has no reward
        assert (min(histogram["bins"]), max(histogram["bins"])) == (0.1, 0.9)


def test_the_table_keeps_the_rows_of_every_step(logged):
    run_dir, history, max_steps = logged
    increments = [row["examples"] for row in history if "examples" in row]
    per_increment = 1 if max_steps == STEPS else 4  # 300 steps in at most 90 increments
    assert len(increments) == STEPS // per_increment + 1
    assert [cell["increment_num"] for cell in increments] == list(range(len(increments)))
    assert len(increments[-1]["previous_increments_paths"]) == len(increments) - 1

    rows = []
    for cell in increments:
        table = json.loads((run_dir / "files" / cell["path"]).read_text())
        rows += [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["step"] for row in rows] == [s for s in range(1, STEPS + 1) for _ in range(ROWS)] + [STEPS + 1]
    assert len({row["question"] for row in rows}) == len(rows)  # each once

    first = rows[:ROWS]
    rewards = [row["reward"] for row in first]
    assert rewards[0] is None and rewards[1:] == sorted(rewards[1:])  # from failures to successes
    assert (rewards[1], rewards[-1]) == (0.1, 0.9)
    assert first[0]["plan"] is None and "worker failed" in first[0]["other"]
    assert first[-1]["question"] == "question 1-9 日本 ?" and first[-1]["correct"] is False
    assert json.loads(first[3]["plan"])["subproblems"] == ["a", "b"]
    # What `wandb sync` will upload is staged with the run, not in the home directory.
    assert list((run_dir.parent / "data" / "artifacts" / "staging").rglob("*"))


def test_a_failing_wandb_never_ends_a_training(logs):
    results, _, stderr = logs
    assert results["broken"] == "there is no W&B run: call start_wandb first"
    assert stderr.count("W&B logging failed, training goes on") == 1 and len(stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "train/loss"),
        ("reward", "reward/mean"),
        ("reward_std", "reward/std"),
        ("frac_reward_zero_std", "reward/frac_zero_std"),
        ("correctness", "correctness"),
        ("subproblem_relevance", "subproblem_relevance"),
        ("completions/clipped_ratio", "completions/clipped_ratio"),
        ("eval_reward", "eval/reward"),
        ("train_runtime", "train/runtime"),
    ],
)
def test_names(name, expected):
    assert wandb_name(name) == expected


def test_only_training_steps_are_steps():
    assert step_metrics({"loss": 1.0, "x": "text", "flag": True}) == {"loss": 1.0}
    assert step_metrics(None) is step_metrics({}) is None
    assert step_metrics({"eval_loss": 1.0}) is step_metrics({"train_runtime": 1.0, "train_loss": 2.0}) is None
