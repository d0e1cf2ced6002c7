"""Fixtures with real models: the packaged SmolLM2-135M, and a tiny Llama that learns within seconds to write plans."""

from __future__ import annotations

import os

# Before torch is imported anywhere: processes that test at the same time (`pytest -n`) have a core each.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import functools
import json
import re
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from forks import Forks
from misbehaving import LoraServer, MisbehavingServer
from tiny import QUESTIONS, teach_planner

import inference_vllm
from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
VLLM_INSTALL_SECONDS = 900
# Packages that take seconds to import. Light modules must not import them (test_architecture.py, test_cli.py).
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "sentence_transformers", "bitsandbytes", "wandb", "numpy"}


_until_the_end = contextlib.ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """What this process of tests has opened is closed at its end."""
    config.add_cleanup(_until_the_end.close)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With several test processes (`pytest -n`): all tests of one file run in one process, and so do all with vLLM.

    Two processes would install vLLM at the same time, and several servers (4 GB each) would not fit into memory.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "vllm" if is_of_vllm(file) else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with vLLM come first, because they take longest."""
    items.sort(key=lambda item: not is_of_vllm(item.nodeid.split("::")[0]))


def is_of_vllm(file: str) -> bool:
    """Whether a test file needs a vLLM server; those files have it in their names."""
    return "vllm" in Path(file).name


def free_port() -> int:
    """A port of this machine on which no program listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def run_script(script: str, *flags: str, timeout: float = 600, env: dict[str, str] | None = None):
    """Run an entry script with its flags. Returns the completed process with its output as text.

    A script that imports torch is forked from an interpreter that has done so, which saves 12 seconds. With variables of
    its own it starts as a user would start it, because libraries read them when they are imported.
    """
    if script == "inference_vllm.py" or env is not None:
        return start_script(script, *flags, timeout=timeout, env=env)
    run = forks().start(script, *flags, apart=True)
    code = run.wait(timeout)
    return subprocess.CompletedProcess([script, *flags], code, run.text(), run.errors.read_text())


def start_script(script: str, *flags: str, timeout: float = 600, env: dict[str, str] | None = None):
    """Run an entry script in a new interpreter, as a user would. Returns the completed process with its output as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
        check=False,
    )


@functools.cache
def forks() -> Forks:
    """The interpreter that `run_script` forks, started when it is first needed."""
    logs = Path(_until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="forks-")))
    return _until_the_end.enter_context(Forks(logs, {}, wandb=True))


def needs_bf16() -> None:
    """Skip the test on a processor without bf16 instructions."""
    from common.models import multiplies_bf16

    if not multiplies_bf16():
        pytest.skip("this processor has no instructions for bf16 (AVX512-BF16 or AMX)")


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    """A real HTTP server; the test chooses its answers, faults and delays."""
    running = MisbehavingServer()
    yield running
    running.close()


@pytest.fixture
def two() -> Iterator[list[LoraServer]]:
    """Two servers that accept adapters."""
    running = [LoraServer(), LoraServer()]
    yield running
    for each in running:
        each.close()


def ask(server: MisbehavingServer, *flags: str) -> int:
    """Run the inference script in this process without retries. Returns its exit code."""
    default = () if {"--question", "--input", "--benchmark"} & set(flags) else ("--question", "How many?")
    retries = () if "--retries" in flags else ("--retries", "0")
    return inference_vllm.main(["--base-url", server.url, *retries, *default, *flags])


def failure(server: MisbehavingServer, *flags: str) -> tuple[int, str]:
    """(exit code, error line) of a run that cannot continue."""
    with pytest.raises(UserError) as caught:
        ask(server, *flags)
    assert "\n" not in str(caught.value)
    return caught.value.exit_code, str(caught.value)


def flags(args) -> list[str]:
    """The command line for a settings object."""
    from common.settings.fields import flag_of
    from common.settings.grpo import TrainingArgs

    defaults = TrainingArgs().to_dict()
    found = []
    for name, value in args.to_dict().items():
        if value == defaults[name] or name == "use_4bit":
            continue
        flag = flag_of(name)
        found += [flag if value else "--no-" + flag[2:]] if isinstance(value, bool) else [flag, str(value)]
    return [*found, "--no-4bit"]


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct, fp32."""
    from common.models import load_base, load_tokenizer
    from common.settings.grpo import PACKAGED_MODEL

    tokenizer = load_tokenizer(PACKAGED_MODEL)
    return load_base(PACKAGED_MODEL, four_bit=False).eval(), tokenizer


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory) -> Path:
    """A data set file with GSM8K's columns."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"question": q, "answer": f"#### {sum(map(int, q[8:-1].split(' + ')))}"} for q in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_planner(tmp_path_factory) -> str:
    """Folder of `tiny.teach_planner`'s model."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-planner"
    teach_planner(folder)
    return str(folder)


@pytest.fixture
def tiny_args(tiny_planner, questions_file, tmp_path):
    """Settings of a GRPO run on the tiny planner that takes seconds."""
    from common.settings.grpo import TrainingArgs

    return TrainingArgs(
        base_model=tiny_planner,
        dataset=str(questions_file),
        output_dir=str(tmp_path / "run"),
        planner_style="short",
        worker_style="few-shot",
        worker_max_tokens=8,
        max_completion_length=60,
        batch_size=4,
        grad_accum=2,
        num_generations=4,
        max_steps=3,
        temperature=1.0,
        lr=1e-3,
        lr_schedule="constant",
        save_steps=2,
        wandb=False,
        use_4bit=False,
    )


@pytest.fixture(scope="session")
def finished_run(tiny_planner, questions_file, tmp_path_factory):
    """The folder of a run of four steps through the command line, with a checkpoint after two."""
    from common.settings.grpo import TrainingArgs

    args = TrainingArgs(
        base_model=tiny_planner, dataset=str(questions_file), output_dir=str(tmp_path_factory.mktemp("run") / "out"),
        planner_style="short", worker_style="few-shot", worker_max_tokens=8, max_completion_length=60, batch_size=4,
        grad_accum=2, num_generations=4, max_steps=4, temperature=1.0, lr=1e-3, lr_schedule="constant", save_steps=2,
        wandb=False,
    )  # fmt: skip
    done = start_script("grpo_training.py", *flags(args))
    assert done.returncode == 0, done.stderr
    return args, Path(args.output_dir), done


@pytest.fixture(scope="session")
def smollm2_adapter(questions_file, tmp_path_factory) -> Path:
    """Folder of a SmolLM2 adapter from grpo_training.py, after a few supervised steps so that rewards differ."""
    import torch
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("smollm2")
    small = ["--demo", "--lora-layers", "4"]
    warm = [*small, "--max-samples", "34", "--batch-size", "8", "--lr", "3e-3", "--output-dir", str(folder / "warm")]
    done = run_script("dummy_planner.py", *warm)
    assert done.returncode == 0, done.stderr
    done = run_script(
        "grpo_training.py", "--demo", "--adapter-path", str(folder / "warm"), "--dataset", str(questions_file),
        "--output-dir", str(folder / "trained"), "--worker-max-tokens", "8", "--max-completion-length", "32",
        "--batch-size", "4", "--grad-accum", "1", "--num-generations", "4", "--max-steps", "1",
        "--format-weight", "0.5", "--eval-samples", "0", "--lr", "1e-3", "--warmup-steps", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("warm", "trained"))
    assert any(not torch.equal(after[name], before[name]) for name in before), "GRPO changed nothing"
    return folder / "trained"


@pytest.fixture(scope="session")
def planner_adapter(tmp_path_factory) -> str:
    """Folder of a LoRA adapter on SmolLM2 that learned for seconds to answer with a plan, unlike its base model."""
    import torch
    from peft import get_peft_model

    from common.models import load_base, load_tokenizer, lora_config
    from common.plans import Plan
    from common.prompts import planner_messages, render
    from common.runs.adapters import save_adapter
    from common.runs.files import write_json
    from common.runs.record import TRAINING_CONFIG, run_record
    from common.settings.grpo import PACKAGED_MODEL, TrainingArgs

    tokenizer = load_tokenizer(PACKAGED_MODEL)
    base = load_base(PACKAGED_MODEL, four_bit=False)
    torch.manual_seed(0)
    args = TrainingArgs(
        base_model=PACKAGED_MODEL, planner_style="short", worker_style="few-shot", lora_layers=4, worker_max_tokens=48
    )
    model = get_peft_model(base, lora_config(args, base))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    rows = []
    for question in QUESTIONS:
        a, b, c = question[8:-1].split(" + ")
        prompt = tokenizer(render(tokenizer, planner_messages(question, "short")), add_special_tokens=False).input_ids
        plan = Plan(True, (f"What is {a} + {b}?", f"What is {b} + {c}?"))
        rows.append((prompt, [*tokenizer(plan.to_json()).input_ids, tokenizer.eos_token_id]))
    for step in range(24):
        prompt, target = rows[step % len(rows)]
        labels = torch.tensor([[-100] * len(prompt) + target])
        loss = model(input_ids=torch.tensor([prompt + target]), labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, tokenizer, folder)
    write_json(folder / TRAINING_CONFIG, run_record(args.to_dict(), script="grpo_training.py"))
    return str(folder)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """Python of an environment with vLLM, made by the target that `make serve-demo` uses. Without it the test skips."""
    environment = ROOT / os.environ.get("VLLM_VENV", ".venv-vllm")
    if not (environment / ".installed").exists():
        try:
            made = subprocess.run(
                ["make", f"VLLM_VENV={environment}", f"{environment}/.installed"],
                cwd=ROOT, capture_output=True, text=True, timeout=VLLM_INSTALL_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"vLLM for CPUs cannot be installed here: {error}")
        if made.returncode != 0:
            pytest.skip(f"vLLM for CPUs cannot be installed here: {made.stderr.strip().splitlines()[-1:]}")
    return environment / "bin" / "python"


@pytest.fixture(scope="session")
def vllm_server(vllm_python, tmp_path_factory):
    """A context manager that runs vLLM with the given arguments (the port is added) and gives its address."""
    from common.errors import UserError
    from common.servers import vllm

    available = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    memory = int(available[1]) / 2**20
    if memory < 5:
        pytest.skip(f"a vLLM server needs about 4 GB of memory, {memory:.1f} GB are free")

    @contextlib.contextmanager
    def serve(
        command: Sequence[str], environment: dict[str, str] | None = None, port: int | None = None
    ) -> Iterator[str]:
        port = port or free_port()
        log = tmp_path_factory.mktemp("vllm") / "log"
        with log.open("wb") as stream:
            server = vllm.start(vllm_python, [*command, "--port", str(port)], stream.fileno(), environment or {})
        try:
            try:
                vllm.wait_until_ready(server, port)
            except UserError as error:
                pytest.fail(f"{error}\n{log.read_text()[-3000:]}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            vllm.stop(server)

    return serve


@pytest.fixture(scope="session")
def adapter(finished_run) -> Path:
    """An adapter of the tiny planner, trained by grpo_training.py."""
    return finished_run[1]


@pytest.fixture(scope="session")
def merged(adapter, tmp_path_factory) -> Path:
    """Folder of the merged tiny planner, with several weight files."""
    from merges import merge

    target = tmp_path_factory.mktemp("merged") / "planner"
    assert merge(adapter, target, "--max-shard-size", "5MB") == 0
    return target


@pytest.fixture(scope="module")
def trainer_args(tmp_path_factory):
    """The arguments that transformers' Trainer passes to its callbacks, except the state."""
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("args")), use_cpu=True, report_to=[])


def state_at(step: int, max_steps: int = 100, main: bool = True):
    """The Trainer's state after this number of steps."""
    from transformers import TrainerState

    return TrainerState(global_step=step, max_steps=max_steps, logging_steps=1, is_world_process_zero=main)


def png_size(path: Path) -> tuple[int, int]:
    """(width, height) of a PNG file, which must be complete."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height
