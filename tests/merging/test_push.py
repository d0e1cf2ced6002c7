"""Push over real HTTP: uploaded files, refusals, retries, and continuing an interrupted upload."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from hub_server import FINE, READ, WRITE, Fault, HubServer, Repo
from planted import everything, found

import merge_and_push


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def certified(finished_run, tmp_path_factory) -> Path:
    """A finished merge in two weight files, which can be pushed again without a model."""
    target = tmp_path_factory.mktemp("certified") / "planner"
    assert merge_and_push.main([*flags(finished_run, target), "--no-push"]) == 0
    return target


@pytest.fixture
def copy(certified, tmp_path) -> Path:
    target = tmp_path / "planner"
    shutil.copytree(certified, target)
    return target


def flags(finished_run, target: Path, repo: str = "user/planner") -> list[str]:
    """The documented command, for the tiny planner."""
    args, adapter, _ = finished_run
    return [
        "--base-model", args.base_model, "--adapter-path", str(adapter), "--repo-name", repo,
        "--local-save-path", str(target), "--max-shard-size", "8MB",
    ]  # fmt: skip


def environment(hub: HubServer, token: str | None, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token or "", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home / "hf"),
    }  # fmt: skip


@pytest.fixture
def push(hub, finished_run, copy, tmp_path):
    """A function that pushes the finished merge to the local Hub."""

    def run(*more: str, token: str | None = WRITE, repo: str = "user/planner"):
        done = run_script(
            "merge_and_push.py", *flags(finished_run, copy, repo), *more, env=environment(hub, token, tmp_path)
        )
        assert "Traceback" not in done.stderr, done.stderr
        for secret in (WRITE, READ, FINE):
            assert secret not in done.stdout + done.stderr, "a token on the terminal"
        return done

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_first_documented_command_merges_and_pushes_byte_for_byte(hub, finished_run, tmp_path):
    args, trained, _ = finished_run
    adapter = tmp_path / "grpo_planner_adapter"
    shutil.copytree(trained, adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    done = run_script(
        "merge_and_push.py", "--base-model", args.base_model, "--adapter-path", str(adapter), "--repo-name", "user/name",
        env=environment(hub, WRITE, tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/user/name" in done.stdout
    assert hub.repos["user/name"].files == files(tmp_path / "grpo_planner_adapter-merged")
    assert not hub.repos["user/name"].private
    assert WRITE not in done.stdout + done.stderr + "".join(map(str, hub.repos["user/name"].files.values()))
    # The permission is checked before anything is created.
    asked = [path for _, path in hub.log]
    assert asked.index("/api/whoami-v2") < asked.index("/api/repos/create")


def test_the_way_that_the_real_hub_takes_is_byte_for_byte_too(hub, finished_run, copy, tmp_path):
    """Large files go through Xet, huggingface_hub's default, into a store on this disk, and are read back."""
    import hf_xet

    hub.xet_store = tmp_path / "store"
    hub.xet_store.mkdir()
    env = environment(hub, WRITE, tmp_path) | {"HF_HUB_DISABLE_XET": "0"}
    done = run_script("merge_and_push.py", *flags(finished_run, copy), env=env)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["user/planner"]
    assert {*repo.files, *repo.in_xet} == set(files(copy)) and {*repo.files}.isdisjoint(repo.in_xet)
    assert repo.files == {name: content for name, content in files(copy).items() if name in repo.files}
    sources = [copy / name for name in repo.in_xet]
    assert {path.suffix for path in sources} >= {".safetensors"}
    hashes = hf_xet.hash_files([str(path) for path in sources])
    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{hub.xet_store}") as group:
        for path, found in zip(sources, hashes, strict=True):
            group.start_download_file(hf_xet.XetFileInfo(found.hash, path.stat().st_size), str(tmp_path / path.name))
    for path in sources:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        assert repo.in_xet[path.name] == merge_and_push.certifying.sha256(path)


def test_a_private_repo_a_bare_name_and_a_token_flag(hub, push, copy):
    done = push("--private", "--token", WRITE, token=None, repo="planner")
    assert done.returncode == 0, done.stderr
    assert hub.repos["user/planner"].private and hub.repos["user/planner"].files == files(copy)


def test_an_existing_repo_is_fine_and_nothing_is_sent_twice(hub, push, copy):
    assert push().returncode == 0
    repo, sent = hub.repos["user/planner"], hub.uploaded
    assert push().returncode == 0
    assert repo.commits == 1 and hub.uploaded == sent and repo.files == files(copy)


@pytest.mark.parametrize(
    ("token", "repo", "more", "message"),
    [
        ("hf_unknown", "user/planner", [], "does not accept the token"),
        (READ, "user/planner", [], "can only read"),
        (READ, "user/existing", [], "may not write to user/existing"),
        (WRITE, "stranger/planner", [], "it may write to user, team"),
        (WRITE, "readers/planner", [], "it may write to user, team"),
        (WRITE, "user/forbidden", [], "may not write to user/forbidden"),
        (FINE, "user/planner", [], "no write permission for user"),
        (WRITE, "user/existing", ["--private"], "exists and is public"),
    ],
)
def test_who_may_not_push_is_told_before_the_merge(hub, finished_run, tmp_path, token, repo, more, message):
    hub.repos |= {"user/existing": Repo(), "user/forbidden": Repo()}
    hub.forbidden.add("user/forbidden")
    done = run_script(
        "merge_and_push.py", *flags(finished_run, tmp_path / "merged", repo), *more,
        env=environment(hub, token, tmp_path),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("merge_and_push.py: error")]
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert token not in done.stderr
    assert not (tmp_path / "merged").exists() and set(hub.repos) == {"user/existing", "user/forbidden"}


def test_a_fine_grained_token_may_write_where_it_says(hub, push, copy):
    assert push(token=FINE, repo="team/planner").returncode == 0
    assert hub.repos["team/planner"].files == files(copy)


def test_passing_failures_are_tried_again(hub, push, copy):
    """A server error at every stage, a conflict, a connection that breaks within a file, a lost answer."""
    hub.faults += [
        Fault("GET", "/api/whoami-v2", 500), Fault("POST", "/api/repos/create", 503), Fault("POST", "/preupload/", 500),
        Fault("POST", "/info/lfs/objects/batch", 502), Fault("PUT", "/lfs/object/", "cut"),
        Fault("PUT", "/lfs/object/", 500), Fault("POST", "/commit/", 409), Fault("POST", "/commit/", "lost"),
    ]  # fmt: skip
    done = push()
    assert done.returncode == 0, done.stderr
    assert not any(fault.times for fault in hub.faults), "every fault must have struck"
    repo = hub.repos["user/planner"]
    assert repo.files == files(copy) and repo.commits == 1, "the commit whose answer was lost is not done twice"
    assert "it answered 409, again in 1 s" in done.stderr


def test_an_upload_that_breaks_off_says_the_command_that_continues_it(hub, push, copy, tmp_path):
    """The second weight file always fails. Files that arrived are not sent again."""
    weights = sorted(copy.glob("*.safetensors"))
    assert len(weights) == 2
    second = merge_and_push.certifying.sha256(weights[1])
    hub.faults.append(Fault("PUT", second, 403, times=99))
    before = files(copy)
    done = push()
    assert done.returncode == 1, done.stderr
    assert "may not write to user/planner" in done.stderr
    assert not hub.repos["user/planner"].files, "half a model is never visible"
    assert files(copy) == before
    command = next(line for line in done.stderr.splitlines() if line.startswith("  python merge_and_push.py"))
    hub.faults.clear()
    hub.uploaded = 0
    words = shlex.split(command)
    words[:2] = [sys.executable, str(ROOT / "merge_and_push.py")]
    again = subprocess.run(
        words, env={**os.environ, **environment(hub, WRITE, tmp_path)}, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert hub.repos["user/planner"].files == before
    large = [path for path in copy.iterdir() if path.suffix != ".safetensors" and path.stat().st_size > 1_000_000]
    first_time = sum(path.stat().st_size for path in [weights[1], *large])
    assert hub.uploaded <= first_time, "the first weight file had arrived"


def test_a_line_that_stays_cut_and_a_signal_end_the_upload_with_the_same_advice(hub, finished_run, copy, tmp_path):
    hub.faults.append(Fault("PUT", "/lfs/object/", "cut", times=999))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "merge_and_push.py"), *flags(finished_run, copy)],
        env={**os.environ, **environment(hub, WRITE, tmp_path)},
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not hub.uploaded:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "continue the upload with\n  python merge_and_push.py --base-model" in errors
    assert not hub.repos["user/planner"].files


def test_a_card_that_the_hub_refuses_is_told_with_its_reason_in_one_line(hub, push, copy):
    hub.card_errors = ['"license" must be one of [apache-2.0, mit]', '"datasets[0]" is not valid']
    done = push()
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("merge_and_push.py: error")]
    assert "the Hub refuses what was sent" in line and "--model-card" in line
    assert all(reason in line for reason in hub.card_errors)


def test_an_unreachable_hub_is_one_line(hub, finished_run, tmp_path):
    gone = environment(hub, WRITE, tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run_script("merge_and_push.py", *flags(finished_run, tmp_path / "merged"), env=gone)
    assert done.returncode == 1, done.stderr
    assert "the Hub at http://127.0.0.1:9 failed" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_variable_that_forbids_the_network_is_named_before_the_merge(name, hub, finished_run, tmp_path):
    env = environment(hub, WRITE, tmp_path) | {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "", name: "1"}
    done = run_script("merge_and_push.py", *flags(finished_run, tmp_path / "merged"), env=env)
    assert done.returncode == 2, done.stderr
    assert f"{name} is set, so nothing can be pushed: unset it" in done.stderr and "network" not in done.stderr
    assert not (tmp_path / "merged").exists() and not hub.log


@pytest.mark.parametrize("part", ["/api/whoami-v2", "/api/models/user/planner"])
def test_a_hub_that_takes_requests_and_never_answers_is_one_line(part, hub, finished_run, copy, tmp_path):
    """A question has no body, so a fault in the middle of it waits for ever."""
    hub.faults.append(Fault("GET", part, "cut", times=99))
    code = "import sys, merge_and_push\nfrom common.merging import hub\nhub.SECONDS = 2.0\nmerge_and_push.run(merge_and_push.main)"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags(finished_run, copy)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, **environment(hub, WRITE, tmp_path)},
    )  # fmt: skip
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 1 and f"the Hub at {hub.url} failed" in line and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("method", "part", "status", "given"),
    [
        ("GET", "/api/whoami-v2", 401, "flag"),
        ("GET", "/auth-check", 403, "login"),
        ("POST", "/api/repos/create", 400, "variable"),
        ("PUT", "/lfs/object/", 403, "flag"),
        ("POST", "/commit/", 400, "login"),
    ],
)
def test_a_token_with_a_line_break_works_and_no_fault_shows_it(
    hub, finished_run, copy, tmp_path, method, part, status, given
):
    """On a terminal without Unicode, the table of the certificate does not stop the push either."""
    hub.repos["user/planner"] = Repo()
    hub.faults.append(Fault(method, part, f"echo {status}", times=99))
    if "create" in part:
        del hub.repos["user/planner"]
    env = environment(hub, f"{WRITE} \n" if given == "variable" else None, tmp_path) | {"PYTHONIOENCODING": "ascii"}
    (tmp_path / "hf").mkdir()
    if given == "login":
        (tmp_path / "hf" / "token").write_text(f"{WRITE}\n")
    more = ["--token", f" {WRITE}\n"] if given == "flag" else []
    done = run_script("merge_and_push.py", *flags(finished_run, copy), *more, "--debug", env=env)
    assert hub.faults[0].times < 99 and f"Bearer {WRITE}" in hub.authorised, done.stderr
    assert done.returncode == (2 if method == "GET" else 1), (
        "--debug keeps the exit code: 2 for a token that is refused"
    )
    assert "Traceback" in done.stderr and not found(WRITE, everything(copy, done.stdout, done.stderr))


def test_a_token_that_cannot_be_one_is_refused_before_any_request(hub, finished_run, tmp_path):
    env = environment(hub, None, tmp_path)
    command = flags(finished_run, tmp_path / "merged")
    done = run_script("merge_and_push.py", *command, "--token", "hf_write\nsecret-secret", env=env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("merge_and_push.py: error")]
    assert (
        done.returncode == 2 and len(lines) == 1 and "--token cannot be a key: it has a control character" in lines[0]
    )
    assert "secret" not in done.stderr and not hub.log
