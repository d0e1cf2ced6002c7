"""The command line: fast, light, and clear about wrong input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HEAVY, ROOT, free_port, run_script
from hub_server import Fault, HubServer

from common.errors import UserError, UserErrors
from common.settings.grpo import DEMO, PACKAGED_MODEL, RESUMABLE, TrainingArgs


def test_importing_the_key_classes_and_help_stay_light():
    code = (
        "import sys; from grpo_training import TrainingArgs, FrozenWorker, PipelineExecutor, PipelineRewardFunction\n"
        "import grpo_training\n"
        "try: grpo_training.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"heavy = set(sys.modules) & {HEAVY!r}\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for flag in ("--base-model", "--no-4bit", "--gate-on-correct", "--worker-max-tokens", "--resume"):
        assert flag in done.stdout


def test_documented_defaults():
    documented = {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct", "lora_r": 16, "lora_alpha": 32, "lr": 1e-5, "batch_size": 1,
        "grad_accum": 8, "max_steps": 500, "num_generations": 4, "temperature": 0.7, "correctness_weight": 1.0,
        "token_weight": 0.2, "independence_weight": 0.3, "max_samples": 1000, "output_dir": "./grpo_planner_adapter",
        "wandb_project": "recursive-reasoner-grpo", "max_tokens": 1000, "format_weight": 0.0, "gate_on_correct": False,
        "dataset": "openai/gsm8k",
    }  # fmt: skip
    defaults = TrainingArgs().to_dict()
    assert {name: defaults[name] for name in documented} == documented


def test_presets_name_real_settings():
    assert set(DEMO) <= set(TrainingArgs().to_dict())
    assert set(TrainingArgs().to_dict()) >= RESUMABLE
    TrainingArgs(**DEMO).validate(world_size=1)


@pytest.mark.parametrize(
    ("batch", "accum", "group", "processes", "legal"),
    [
        (1, 4, 4, 1, True),
        (1, 8, 4, 1, True),
        (1, 2, 4, 1, False),
        (1, 6, 4, 1, False),
        (1, 2, 4, 2, True),
        (3, 4, 4, 1, True),
    ],
)
def test_groups_must_fill_the_generation_batch(batch, accum, group, processes, legal):
    args = TrainingArgs(batch_size=batch, grad_accum=accum, num_generations=group)
    if legal:
        args.validate(world_size=processes)
        return
    with pytest.raises(UserErrors) as caught:
        args.validate(world_size=processes)
    # The value that the message recommends must be valid itself.
    values = str(caught.value).split("use --grad-accum ")[1].split(",")[0].split(" or ")
    for value in values:
        TrainingArgs(batch_size=batch, grad_accum=int(value), num_generations=group).validate(world_size=processes)


BAD_ROWS = {
    "broken.jsonl": ('{"question": "a", "answer": "#### 1"}\n{"question": \n', "broken.jsonl:2"),
    "columns.jsonl": ('{"problem": "a", "solution": "#### 1"}\n', "problem, solution"),
    "nonumber.jsonl": ('{"question": "a", "answer": "#### 1"}\n\n{"question": "b", "answer": "#### many"}\n', "nonumber.jsonl:3"),
    "anumber.jsonl": ('{"question": "b", "answer": 7}\n', "found 7 in column 'answer', text that ends in '#### 7' is expected"),
    "nomarker.jsonl": ('{"question": "b", "answer": "7"}\n', "####"),
    "list.jsonl": ("[1, 2]\n", "list.jsonl:1"),
    "empty.jsonl": ("\n", "empty"),
    "bad.parquet": ("not parquet", "not a parquet file"),
    "words.csv": ("question,answer\n", "neither .jsonl nor .parquet"),
}  # fmt: skip


def wrong_input(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """name → (flags, text that the one line must contain)."""
    cases: dict[str, tuple[list[str], str]] = {
        "unknown flag": (["--learning-rat", "1"], "--learning-rat"),
        "not a number": (["--lr", "fast"], "fast"),
        "nan": (["--lr", "nan"], "finite"),
        "negative": (["--max-steps", "0"], "--max-steps must be greater than 0, found 0"),
        "one generation": (["--num-generations", "1"], "at least 2"),
        "indivisible": (["--grad-accum", "6"], "--grad-accum 4 or 8"),
        "unknown choice": (["--worker-style", "loud"], "few-shot"),
        "no such file": (["--dataset", "./none.jsonl"], "none.jsonl does not exist"),
        "no such task": (["--dataset", "reasoning-gym:chain_sun"], "chain_sum"),
        "no such model folder": (["--base-model", str(tmp_path / "none")], "does not exist"),
        "a file as model": (["--base-model", __file__], f"--base-model {__file__} is a file: name the folder"),
        "no name of a model": (["--base-model", "a model"], "a model is no folder and no Hub id (owner/name)"),
        "no encoder": (["--base-model", PACKAGED_MODEL, "--embedding-model", "./enc"], "no Hub id"),
        "too few questions": (
            ["--base-model", PACKAGED_MODEL, "--grad-accum", "64"],
            "gives 4 questions, one step takes",
        ),
        "no such packaged model": (["--base-model", "packaged/SmolLM2"], "is not packaged"),
        "empty model": (["--base-model", ""], "--base-model is empty"),
        "empty data set": (["--dataset", ""], "--dataset is empty"),
        "bad held-out set": (
            ["--eval-dataset", "./none.jsonl", "--eval-samples", "2"],
            "--eval-dataset none.jsonl does not exist",
        ),
        "empty output": (["--output-dir", ""], "--output-dir is empty"),
        "no adapter": (["--adapter-path", str(tmp_path / "none")], "not a folder"),
        "resume nothing": (["--resume", "--output-dir", str(tmp_path / "none")], "must name the folder of a run"),
        "resumed and only scored": (["--resume", "--eval-only"], "leave one of them out"),
        "no server's address": (["--vllm-url", "localhost:8000"], "--vllm-url 'localhost:8000' is no address"),
        "a server twice": (["--vllm-url", "http://a/v1,http://a/v1"], "--vllm-url names a server twice"),
        "two workers": (["--vllm-url", "http://a/v1", "--worker-url", "http://b/v1"], "leave out --worker-url"),
        "two planners": (["--vllm-url", "http://a/v1", "--vllm-python", "python"], "leave one of them out"),
        "nucleus of a server": (["--vllm-url", "http://a/v1", "--top-p", "0.9"], "use --temperature"),
        "dropout on a server": (["--vllm-python", "python", "--lora-dropout", "0.1"], "without dropout"),
        "all weights 0": (
            ["--correctness-weight", "0", "--token-weight", "0", "--independence-weight", "0"],
            "weights",
        ),
    }
    for name, (text, message) in BAD_ROWS.items():
        (tmp_path / name).write_text(text)
        cases[name] = (["--dataset", str(tmp_path / name)], message)
    (tmp_path / "file").write_text("")
    cases["output is a file"] = (["--output-dir", str(tmp_path / "file")], "is a file")
    empty = tmp_path / "empty-adapter"
    empty.mkdir()
    cases["adapter without files"] = (["--adapter-path", str(empty)], "adapter_config.json is missing")
    other = tmp_path / "other-base"
    other.mkdir()
    (other / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/Other-7B"})
    )
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + b"\0\0\0\0"
    (other / "adapter_model.safetensors").write_bytes(whole)
    cases["adapter of another base"] = (["--adapter-path", str(other)], "x/Other-7B")
    told = tmp_path / "told-otherwise"
    shutil.copytree(other, told)
    (told / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    stored = {"format": "json-plan", "planner_style": "full", "worker_context": "none", "dataset": "multi:a.jsonl"}
    (told / "training_config.json").write_text(json.dumps({"settings": stored}))
    cases["a planner that was told otherwise"] = (["--adapter-path", str(told)], "--worker-context none, this run has")
    cut = tmp_path / "cut-adapter"
    cut.mkdir()
    (cut / "adapter_config.json").write_text((other / "adapter_config.json").read_text())
    (cut / "adapter_model.safetensors").write_bytes(whole[:-2])
    cases["cut-off adapter"] = (["--adapter-path", str(cut)], "promises")
    used = tmp_path / "used"
    used.mkdir()
    (used / "metrics.jsonl").write_text("{}\n")
    (used / "training_config.json").write_text("{}")
    cases["existing run"] = (["--output-dir", str(used)], "--overwrite")
    return cases


def test_wrong_input_is_one_line_exit_code_2_before_anything_heavy_is_imported(tmp_path, questions_file):
    traps = tmp_path / "traps"
    traps.mkdir()
    for package in HEAVY - {"numpy"}:  # which reads parquet files
        (traps / f"{package}.py").write_text(f"raise SystemExit('{package} was imported before the input was right')")
    for name, (flags, message) in wrong_input(tmp_path).items():
        base = [] if "--dataset" in flags else ["--dataset", str(questions_file)]
        if "--output-dir" not in flags:
            base += ["--output-dir", str(tmp_path / "out")]
        done = run_script("grpo_training.py", *base, *flags, env={"PYTHONPATH": str(traps)})
        assert done.returncode == 2, (name, done.returncode, done.stderr)
        assert message in done.stderr, (name, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1, (name, done.stderr)
        assert not (tmp_path / "out").exists(), f"{name}: nothing may be written before the input is right"
    assert (tmp_path / "used" / "metrics.jsonl").read_text() == "{}\n"


def test_a_mistyped_flag_is_told_with_the_one_that_was_meant():
    for script, flag, meant in (
        ("grpo_training.py", "--max_steps=3", "--max-steps"),
        ("grpo_training.py", "--chek", "--check"),
        ("dummy_planner.py", "--lora-rr", "--lora-r"),
        ("inference_vllm.py", "--bas-url", "--base-url"),
        ("merge_and_push.py", "--no-pushh", "--no-push"),
    ):
        done = run_script(script, *(["--repo-name", "a/b"] if script.startswith("merge") else []), flag)
        assert done.returncode == 2 and f"{flag}: did you mean {meant}?" in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert "did you mean" not in run_script("grpo_training.py", "--zebra").stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan_kinds --dataset nope.jsonl", "--dataset nope.jsonl does not exist"),
        ("plan_kinds --dataset generated:shares?people=4", "the plans are made for 6 people"),
        ("plan_kinds --questions 0", "--questions: must be at least 1, found 0"),
        ("composed --source nope.jsonl", "--source nope.jsonl does not exist"),
        ("composed --source generated:shares?people=99", "--source generated:shares?people=99: people must lie"),
    ],
)
def test_a_benchmark_tells_wrong_input_as_the_scripts_do(command, message):
    done = subprocess.run(
        [sys.executable, "-m", *f"tests.benchmarks.{command}".split()],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(("flags", "level"), [([], "ERROR"), (["--debug"], "WARNING")])
def test_the_hubs_retries_are_told_to_a_debugging_user_only(flags, level):
    """Its client warns of each of five attempts before the one line that says what is wrong."""
    code = (
        "import logging, sys\nfrom common import cli\n"
        "def main(_):\n"
        "    import huggingface_hub.file_download\n"
        "    print(logging.getLevelName(logging.getLogger('huggingface_hub.utils._http').getEffectiveLevel()))\n"
        "    return 0\n"
        "cli.run(main)"
    )
    plain = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, env=plain, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == level, done


@pytest.mark.parametrize("script", ["grpo_training.py", "dummy_planner.py"])
def test_going_on_and_replacing_exclude_each_other(script):
    done = run_script(script, "--resume", "--overwrite")
    assert done.returncode == 2 and "leave one of them out" in done.stderr


def test_several_problems_are_told_at_once(questions_file):
    done = run_script("grpo_training.py", "--dataset", str(questions_file), "--lr", "0", "--temperature", "-1")
    assert done.returncode == 2
    assert "--lr" in done.stderr and "--temperature" in done.stderr


@pytest.mark.parametrize("script", ["grpo_training.py", "dummy_planner.py"])
def test_a_misspelt_model_is_told_first_where_the_hub_is_out_of_reach(script, questions_file, tmp_path):
    """Set offline, and without network: in one line that names the ways out, before anything heavy is imported."""
    for name in HEAVY - {"numpy"}:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    gone = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    for env, why in (({}, "HF_HUB_OFFLINE is set"), (gone, "no connection to 127.0.0.1")):
        done = run_script(
            script, "--base-model", "nobody/no-such-model", "--output-dir", str(tmp_path / "run"), "--no-wandb",
            *(["--dataset", str(questions_file)] if script.startswith("grpo") else []),
            env={"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path), **env},
        )  # fmt: skip
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and "--base-model nobody/no-such-model is not on this machine" in line, line
        assert why in line and "use --base-model packaged/" in line and not (tmp_path / "run").exists()


def test_a_model_that_the_hub_does_not_have_is_told_before_anything_is_downloaded(tmp_path):
    with HubServer() as hub:
        hub.faults.append(Fault("HEAD", "nobody/no-such-model/resolve/main/config.json", 404))
        done = run_script(
            "grpo_training.py", "--demo", "--base-model", "nobody/no-such-model", "--output-dir", str(tmp_path / "run"),
            env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)},
        )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "--base-model nobody/no-such-model: the Hub has no such model" in line, line


SCRIPTS = ("grpo_training.py", "dummy_planner.py", "inference_vllm.py", "merge_and_push.py")
ENCODINGS = [
    *({"PYTHONIOENCODING": name} for name in ("ascii", "latin-1", "cp1252", "utf-8:strict")),
    {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_what_a_terminal_cannot_show_ends_no_script(server, encoding):
    """Help with special characters; an answer in many alphabets with half a surrogate pair; a question in one of them."""
    for command in ([str(ROOT / script) for script in SCRIPTS], ["-m", "common.inference.serve_demo"]):
        for words in [[word] for word in command] if command[0] != "-m" else [command]:
            done = subprocess.run(
                [sys.executable, *words, "--help"],
                cwd=ROOT,
                env={**os.environ, **encoding},
                capture_output=True,
                check=False,
            )
            assert done.returncode == 0 and done.stdout and not done.stderr, (words, done.stderr)
    hard = "Größe → 数 🦀 \ud83d"
    server.fault = lambda handler, request: (
        bool(request) and (handler.reply(server.completion(request, f'{hard} {{"final_answer": 5}}')) or True)
    )
    for flags, spoken in ((["--question", f"{hard[:12]}?"], b""), ([], "Größe?\nquit\n".encode())):
        done = subprocess.run(
            [sys.executable, str(ROOT / "inference_vllm.py"), "--base-url", server.url, "--no-probe", *flags],
            env={**os.environ, **encoding}, input=spoken, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert b"answer     5" in done.stdout and b"cost" in done.stdout, "what comes after it is shown too"


def test_a_resumed_run_keeps_its_servers_and_a_run_without_does_not_get_any(tmp_path):
    import grpo_training
    from common.runs.files import write_json
    from common.runs.record import TRAINING_CONFIG, run_record

    def settled(stored: TrainingArgs, *flags: str) -> TrainingArgs:
        write_json(tmp_path / TRAINING_CONFIG, run_record(stored.to_dict(), script="grpo_training.py"))
        options = grpo_training.build_parser().parse_args(["--output-dir", str(tmp_path), *flags])
        found = grpo_training.settle(options)
        found.validate()
        return found

    served = TrainingArgs(vllm_url="http://a/v1", output_dir=str(tmp_path))
    assert settled(served, "--resume").vllm_url == "http://a/v1"
    assert settled(served, "--resume", "--vllm-url", "http://b/v1").vllm_url == "http://b/v1", "a server may move"
    # A run stores the address of the server that it started; that server does not run any more.
    own = TrainingArgs(vllm_url="http://127.0.0.1:8100/v1", vllm_python="python", output_dir=str(tmp_path))
    again = settled(own, "--resume")
    assert (again.vllm_url, again.vllm_python) == (None, "python")
    moved = settled(own, "--resume", "--vllm-url", "http://b/v1")
    assert (moved.vllm_url, moved.vllm_python) == ("http://b/v1", None)
    scored = settled(own, "--eval-only", "--eval-samples", "5")
    assert (scored.vllm_url, scored.vllm_python) == (None, None), "the scoreboard's worker is the model that is here"
    named = TrainingArgs(vllm_url="http://a/v1", worker_model="base", output_dir=str(tmp_path))
    assert settled(named, "--eval-only", "--eval-samples", "5").vllm_url is None, "its model's name there is not used"
    with pytest.raises(UserError, match="samples its plans itself"):
        settled(TrainingArgs(output_dir=str(tmp_path)), "--resume", "--vllm-url", "http://a/v1")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("OSError(24, 'Too many open files')", "too many open files: raise the limit, such as with `ulimit -n 4096`"),
        (
            'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried")',
            "memory ran out: use smaller batches",
        ),
        ("MemoryError()", "memory ran out"),
        ('RuntimeError("can\'t start new thread")', "memory or the number of processes"),
        ("RuntimeError('could not create a primitive')", "oneDNN says this mostly when memory ran out"),
        ("KeyError('x')", "--debug shows where"),
    ],
)
def test_a_limit_of_the_machine_is_told_with_the_way_out(error, told):
    code = f"from common.cli import run\ndef main(argv):\n  raise {error}\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and told in line


def test_the_end_of_another_process_is_told_without_the_words_of_the_library():
    """As gloo tells it where one of two ranks was stopped within a scoreboard. Alone, a process has no other."""
    said = "[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16264. GLHF!"
    code = f"from common.cli import run\ndef main(argv):\n  raise RuntimeError({said!r})\nrun(main)"
    for processes, told in (("2", "another process of this run has ended"), ("1", "RuntimeError: [/x/gloo")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "WORLD_SIZE": processes},
        )  # fmt: skip
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and told in line and ("GLHF" in line) == (processes == "1")


@pytest.mark.parametrize(
    ("error", "code"),
    [("UserError('bad input')", 2), ("UserError('no network', exit_code=3)", 3), ("KeyError('x')", 1), ("ModuleNotFoundError(name='x')", 1)],
)  # fmt: skip
def test_debug_adds_the_traceback_and_changes_neither_the_line_nor_the_exit_code(error, code):
    program = (
        f"from common.cli import run\nfrom common.errors import UserError\ndef main(argv):\n  raise {error}\nrun(main)"
    )
    plain, debug = (
        subprocess.run([sys.executable, "-c", program, *more], cwd=ROOT, capture_output=True, text=True, check=False)
        for more in ([], ["--debug"])
    )
    assert (plain.returncode, debug.returncode) == (code, code)
    assert "Traceback" not in plain.stderr and "Traceback" in debug.stderr
    assert debug.stderr.endswith(plain.stderr), "a reader of the last line finds the same one"
