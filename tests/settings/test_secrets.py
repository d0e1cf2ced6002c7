"""Keys are cleaned and checked, and scripts never print or write them, whatever servers and libraries do."""

from __future__ import annotations

import base64
import json

import pytest
from conftest import QUESTIONS, run_script
from hub_server import Fault, HubServer
from misbehaving import FAULTS, asks
from planted import HUB, OPENAI, WANDB, answers, everything, found

from common.errors import UserError
from common.settings import secrets


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Keys that one test protects are not hidden in the next."""
    monkeypatch.setattr(secrets, "_parts", set())


def test_a_key_is_stripped_and_one_that_cannot_be_a_key_is_refused_without_being_shown(monkeypatch):
    assert secrets.clean_key(f" {OPENAI}\r\n", "X") == OPENAI
    assert secrets.clean_key(None, "X") is secrets.clean_key(" \n", "X") is None
    for inside, kind in (
        (" ", "a space inside"),
        ("\n", "a control character"),
        ("\x7f", "a control"),
        ("é", "a letter that is not ASCII"),
    ):
        with pytest.raises(UserError, match=f"X cannot be a key: it has {kind}") as caught:
            secrets.clean_key(OPENAI[:12] + inside + OPENAI[12:], "X")
        assert "\n" not in str(caught.value) and not found(OPENAI, str(caught.value))
    monkeypatch.setenv("OPENAI_API_KEY", OPENAI + "\n")
    assert secrets.api_key(None) == OPENAI and secrets.api_key("other-key") == "other-key"


@pytest.mark.parametrize(
    ("source", "way_out"),
    [("--token", "leave it out"), ("HF_TOKEN", "unset it"), ("the login's token in /home/u/token", "log in again")],
)
def test_a_key_that_cannot_be_one_is_told_with_a_way_out_that_fits_where_it_came_from(source, way_out):
    with pytest.raises(UserError, match=f"copy it again, or {way_out}$"):
        secrets.clean_key("hf_" + "a" * 20 + "\tb", source)


def test_a_key_is_hidden_in_every_way_of_writing_it_and_the_rest_stays():
    secrets.protect(OPENAI)
    secrets.protect("quo'te\"d\\key")
    for prefix in ("", "x", "xy"):
        encoded = base64.b64encode(f"{prefix}{OPENAI}".encode()).decode()
        assert len(secrets.redact(encoded)) < len(encoded) - len(OPENAI)
        assert not found(OPENAI, secrets.redact(encoded))
    for text in (OPENAI, repr(OPENAI.encode()), json.dumps({"a": OPENAI}), OPENAI[:9] + "***", OPENAI.encode().hex()):
        assert not found(OPENAI, secrets.redact(f"before {text} after"))
        assert secrets.redact(f"before {text} after").startswith("before ")
    assert secrets.redact(repr("quo'te\"d\\key")).count("[key]") == 1
    assert secrets.redact("nothing of it") == "nothing of it"
    secrets.protect("EMPTY")  # a usual placeholder for local servers
    assert secrets.redact("EMPTY") == "EMPTY"


def test_errors_and_what_led_to_them_are_scrubbed():
    secrets.protect(HUB)
    try:
        try:
            raise ValueError(f"Illegal header value b'Bearer {HUB}'")
        except ValueError as cause:
            raise RuntimeError("failed", HUB.encode(), {"body": [HUB]}) from cause
    except RuntimeError as error:
        error.message = f"with {HUB}"
        secrets.scrub(error)
        assert error.__cause__ is not None
        assert not found(HUB, f"{error!r} {error.__cause__!r} {vars(error)}")


@pytest.fixture
def planted(tmp_path, server) -> dict[str, str]:
    """An environment with a key in every place for one, each with a line break at its end."""
    home = tmp_path / "home"
    (home / "hf").mkdir(parents=True)
    (home / "hf" / "token").write_text(HUB + "\n")
    (home / "netrc").write_text(f"machine 127.0.0.1 login user password {WANDB}\n")
    return {
        "OPENAI_API_KEY": OPENAI + "\n", "HF_HOME": str(home / "hf"), "NETRC": str(home / "netrc"), "HF_TOKEN": "",
        "HTTP_PROXY": "", "WANDB_MODE": "offline",
    }  # fmt: skip


def shown(done, folder) -> set[str]:
    """Parts of the planted keys in the output of a script, and in the files below a folder."""
    text = everything(folder, done.stdout, done.stderr)
    return {part for key in (OPENAI, HUB, WANDB) for part in found(key, text)}


def test_a_key_reaches_the_server_without_its_line_break(server, planted):
    done = run_script("inference_vllm.py", "--base-url", server.url, "--question", "How many?", env=planted)
    assert done.returncode == 0, done.stderr
    assert server.headers["Authorization"] == f"Bearer {OPENAI}"


@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_of_a_server_shows_the_key_in_a_traceback(server, planted, tmp_path, name):
    server.fault = lambda handler, request: bool(request) and FAULTS[name](handler, request)
    done = run_script(
        "inference_vllm.py", "--base-url", server.url, "--question", "How many?", "--api-key", f"{OPENAI} ",
        "--no-probe", "--retries", "0", "--debug", env={**planted, "OPENAI_API_KEY": ""},
    )  # fmt: skip
    assert server.headers["Authorization"] == f"Bearer {OPENAI}"
    assert "Traceback" in done.stderr or name == "the key as answer", done.stderr
    assert not shown(done, tmp_path / "none")


def test_no_fault_of_a_server_puts_the_key_into_the_answers(server, planted, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"question": f"<{name}>"}) + "\n" for name in FAULTS))

    def fault(handler, request):
        name = next((name for name in FAULTS if asks(request, f"<{name}>")), None)
        return name is not None and FAULTS[name](handler, request)

    server.fault = fault
    written = tmp_path / "out"
    written.mkdir()
    done = run_script(
        "inference_vllm.py", "--base-url", server.url, "--input", str(tmp_path / "in.jsonl"), "--output",
        str(written / "out.jsonl"), "--retries", "1", "--timeout", "10", env=planted,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    failed = [record["error"] is not None for record in answers(written / "out.jsonl")]
    assert failed == [name != "the key as answer" for name in FAULTS]
    assert not shown(done, written)


def test_no_list_of_models_and_no_misspelt_flag_shows_the_key(server, planted, tmp_path):
    for name in ("status 400", "the key as answer", "a page", "no HTTP", "a redirect"):
        server.fault = FAULTS[name]
        done = run_script(
            "inference_vllm.py", "--base-url", server.url, "--question", "Q", "--retries", "0", env=planted
        )
        assert done.returncode in (1, 2) and not shown(done, tmp_path / "none"), name
    for flags in (["--apikey", OPENAI], [f"--api-kee={OPENAI}"], ["--base-url", f"http://me:{OPENAI}@h/v1"]):
        done = run_script("inference_vllm.py", "--question", "Q", *flags, env={**planted, "OPENAI_API_KEY": ""})
        assert done.returncode == 2 and not shown(done, tmp_path / "none"), done.stderr


def test_nothing_that_a_grpo_run_writes_holds_a_key(server, planted, tiny_planner, questions_file, tmp_path):
    """The worker's server has all faults in turn; W&B is on, and its server fails too."""
    faults, turn = list(FAULTS.values()), [0]

    def fault(handler, request):
        if not any(asks(request, question[8:13]) for question in QUESTIONS):
            return False
        turn[0] += 1
        return faults[turn[0] % len(faults)](handler, request)

    server.fault = fault
    written = tmp_path / "run"
    done = run_script(
        "grpo_training.py", "--base-model", tiny_planner, "--dataset", str(questions_file), "--output-dir", str(written),
        "--planner-style", "short", "--worker-url", server.url, "--max-completion-length", "60", "--batch-size", "4",
        "--grad-accum", "2", "--max-steps", "2", "--temperature", "1", "--worker-cache-size", "0", "--debug",
        env={**planted, "WANDB_API_KEY": WANDB + "\n"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert any(record["error"] for record in answers(written / "samples.jsonl")) and list(written.rglob("*.wandb"))
    assert turn[0] > 10 and not shown(done, written)


@pytest.mark.parametrize("script", ["grpo_training.py", "dummy_planner.py"])
def test_no_fault_of_the_hub_shows_its_token(planted, questions_file, tmp_path, script):
    with HubServer() as hub:
        hub.faults.append(Fault("", "", "echo 401", times=9999))
        env = {**planted, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        data = ["--dataset", str(questions_file)] if script == "grpo_training.py" else []
        done = run_script(
            script, "--base-model", "user/model", *data, "--output-dir", str(tmp_path / "run"), "--no-wandb", "--debug",
            env=env,
        )  # fmt: skip
        assert hub.authorised == {f"Bearer {HUB}"}
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert not shown(done, tmp_path / "run")


@pytest.mark.parametrize(
    ("script", "flags", "variable"),
    [
        ("inference_vllm.py", ["--question", "Q"], "OPENAI_API_KEY"),
        ("grpo_training.py", ["--worker-url", "http://127.0.0.1:9/v1"], "OPENAI_API_KEY"),
        ("grpo_training.py", ["--base-model", "user/model"], "HF_TOKEN"),
        ("dummy_planner.py", [], "HF_TOKEN"),
    ],
)
def test_a_key_that_cannot_be_one_is_one_line_before_any_request(planted, tmp_path, script, flags, variable):
    env = {**planted, variable: f"{HUB[:12]} {HUB[12:]}"}
    done = run_script(script, *flags, env=env)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and f"{variable} cannot be a key: it has a space inside" in line
    assert not shown(done, tmp_path / "none")


def test_a_login_that_holds_no_key_and_keys_of_others_do_no_harm(server, planted, tmp_path):
    """A login that a command does not use may be in any state."""
    (tmp_path / "home" / "hf" / "token").write_bytes(b"\xff\xfe" + HUB.encode("utf-16-le"))
    (tmp_path / "home" / "netrc").write_text("machine\n\x00 broken")
    env = {**planted, "WANDB_API_KEY": "not a key", "HF_TOKEN": "not one either"}
    done = run_script("inference_vllm.py", "--base-url", server.url, "--question", "How many?", env=env)
    assert done.returncode == 0, done.stderr
