"""The places where input from outside enters. Each has a function that does what the scripts do with such input."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from misbehaving import MODELS, PLAN, MisbehavingServer

from .inputs import Target
from .stage import Stage

ROW = b'{"question": "Ann has 3 pens, Bob has 5. How many?", "answer": "3 + 5 = 8\\n#### 8"}\n'
PLANS = (
    PLAN.encode(),
    b'<think>{"should_decompose": false}</think>\n```json\n{"should_decompose": true, "subproblems": ["What is 2 + 3?"]}\n```',
    b'Sure! {"should_decompose": false, "subproblems": [], "plan": "Just solve \\u00e9 \\ud83d\\ude00 it.\n"} Done.',
)
ANSWERS = (
    b'3 + 5 = 8\n{"final_answer": 8}', b"So 8,000 - 12% is 7,040.00\n#### 7040", rb"Thus \boxed{\frac{1}{2}} or \boxed{18}.",
    "The answer is −3½ kg. Question: another? Answer: 5".encode(), b"<think>12</think> First, 8 + 5 = 13. Then, 13 + 6 = 19.",
)  # fmt: skip
REPLY = {
    "id": "1", "object": "chat.completion", "model": "base",
    "choices": [{
        "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "8", "reasoning_content": None},
        "logprobs": {"content": [{"token": "8", "logprob": -0.1, "top_logprobs": [{"token": "8", "logprob": -0.1}]}]},
    }],
    "usage": {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16},
}  # fmt: skip
ERROR = {"error": {"message": "maximum context length is 9 tokens", "type": "x", "code": 400, "status": "400"}}
SCRIPTS: dict[str, tuple[bytes, ...]] = {
    "grpo_training": (
        b"--demo\0--max-steps\x003\0--lr\x001e-4\0--output-dir\0out\0--overwrite", b"--output-dir\0out\0--resume",
        b"--base-model\0a/b\0--dataset\0generated:shares?people=6&low=1\0--no-wandb\0--4bit\0--eval-samples\x002",
        b"--worker-url\0http://127.0.0.1:9/v1\0--worker-model\0x\0--vllm-url\0http://a:1/v1,http://b:2/v1\0--top-p\x000.9",
        b"--dataset\0reasoning-gym:chain_sum?max_terms=3\0--eval-only",
    ),
    "dummy_planner": (b"--demo\0--lr\x001e-3\0--num-epochs\x000.5\0--output-dir\0out", b"--resume\0--output-dir\0out"),
    "inference_vllm": (
        b"--question\0How many?\0--json\0--base-url\0http://[::1]:80/v1\0--retries\x000", b"--benchmark\0--samples\x003",
        b"--input\0in.jsonl\0--output\0out.jsonl\0--concurrency\x0064\0--timeout\x001.5\0--no-probe",
    ),
    "merge_and_push": (b"--repo-name\0user/name\0--max-shard-size\x005GB\0--no-push\0--dtype\0float16\0--adapter-path\0out",),
}  # fmt: skip


@contextlib.contextmanager
def all_targets(stage: Stage, place: Path) -> Iterator[list[Target]]:
    """All targets; they work in a folder. Their resources are released at the end."""
    tempfile.tempdir = str(place)
    logging.disable(logging.WARNING)
    with contextlib.ExitStack() as held:
        held.callback(logging.disable, logging.NOTSET)
        held.callback(setattr, tempfile, "tempdir", None)
        yield [*texts(), *files(place), *configs(stage, place), *replies(held), *commands(place), *model_folders(place)]


def texts() -> Iterator[Target]:
    """Texts that models write."""
    from common.grading import is_correct, numbers_in, parse_gold, parse_number, predict
    from common.plans import near_plan_credit, parse_planner_output

    def plan(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        found = parse_planner_output(text)
        if found is not None:
            json.dumps(found.to_json()).encode()
        near_plan_credit(text)

    def answer(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        for finished in (True, False):
            predict(text, finished=finished)
        is_correct(text, Decimal(8))
        numbers_in(text[:500])
        parse_number(text[:500])

    def gold(data: bytes) -> None:
        with contextlib.suppress(ValueError):  # callers add the line number to this error
            parse_gold(data.decode("utf-8", "replace"))

    yield Target("planner outputs", PLANS, plan, weight=90)
    yield Target("worker answers", ANSWERS, answer, weight=60, json=False)
    yield Target("gold answers", (b"3 + 5 = 8\n#### 8", b"#### 1,234.50"), gold, weight=8, json=False)


def files(place: Path) -> Iterator[Target]:
    """Data files, and the questions and answers of a batch."""
    from common.inference.batch import already_answered, read_input
    from common.problems.planning import load_planning_data
    from common.problems.questions import check_source, fingerprint, load_questions

    def written(name: str, use: Callable[[Path], object]) -> Callable[[bytes], None]:
        path = place / name

        def take(data: bytes) -> None:
            path.write_bytes(data)
            use(path)

        return take

    def data(path: Path) -> None:
        check_source(str(path))
        fingerprint(load_questions(str(path), limit=10))

    def answered(path: Path) -> None:
        already_answered(path, read_input(str(asked)))

    asked = place / "asked.jsonl"
    asked.write_bytes(ROW * 2)
    record = {"line": 1, "question": json.loads(ROW)["question"], "answer": "8", "error": None}
    answers = (json.dumps(record) + "\n" + json.dumps({**record, "line": 2, "error": "x"}) + "\n").encode()
    plan = b'{"SystemPrompt": "s", "UserPrompt": "u", "ExpectedOutput": "o"}\n'
    yield Target("data files", (ROW * 3,), written("q.jsonl", data), weight=10)
    yield Target("data files, a list", (b"[" + ROW.strip() + b"]",), written("q.json", data), weight=4)
    planning = written("p.jsonl", lambda path: load_planning_data(str(path), None))
    yield Target("planning data", (plan * 2,), planning, weight=4)
    yield Target("questions of a batch", (ROW * 2, b'{"question": "a", "answer": 7, "id": [1]}\n'),
                 written("i.jsonl", lambda path: read_input(str(path))), weight=8)  # fmt: skip
    yield Target("answers of a batch", (answers,), written("o.jsonl", answered), weight=8)


def configs(stage: Stage, place: Path) -> Iterator[Target]:
    """Files in the folders of an adapter, of a run, and of a merged model."""
    from common import models
    from common.evaluation.scoreboard import stored_rows, why_not_again
    from common.inference.trained_settings import read_training_settings, with_trained
    from common.merging import certificate, model_card
    from common.prompts import planner_messages
    from common.runs.adapters import adapter_origin, check_adds_to_base, read_adapter_config
    from common.runs.checkpoints import complete_checkpoints
    from common.runs.record import check_same_data, check_same_processes, stored_settings
    from common.settings.grpo import RESUMABLE, TrainingArgs
    from common.settings.sft import SupervisedArgs
    from common.training.records import prompt_date
    from dummy_planner import DEFAULTS

    folder = place / "adapter"
    sample_adapter(folder)
    settings = {**TrainingArgs().to_dict(), "output_dir": str(folder)}
    record = {"settings": settings, "script": "grpo_training.py", "processes": 1, "seed": 42, "data_fingerprint": "a" * 16,
              "four_bit": False, "prompt_date": "2026-01-31", "dtype": "torch.float32", "versions": {"trl": "1.16"}}  # fmt: skip
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def into(name: str, use: Callable[[], object]) -> Callable[[bytes], None]:
        def take(data: bytes) -> None:
            (folder / name).write_bytes(data)
            try:
                use()
            finally:
                (folder / name).write_bytes(good[name]) if name in good else (folder / name).unlink()

        return take

    def adapter() -> None:
        adapter_origin(str(folder), "packaged/SmolLM2-135M-Instruct")
        check_adds_to_base(str(folder))
        models.lora_config(TrainingArgs(adapter_path=str(folder)), None)

    def run() -> None:
        values = stored_settings(folder, {"max_steps": 9}, RESUMABLE, "grpo_training.py")
        args = TrainingArgs.from_dict(values)
        args.validate()
        planner_messages("a", args.planner_style)
        check_same_processes(folder)
        check_same_data(folder, "a" * 16)
        prompt_date(TrainingArgs(output_dir=str(folder)), folder)

    def supervised() -> None:
        args = SupervisedArgs.from_dict({**DEFAULTS, **stored_settings(folder, {}, set(), "dummy_planner.py")})
        args.validate()

    def served() -> None:
        with_trained({}, read_training_settings(folder / "training_config.json")).validate()

    sft = SupervisedArgs(base_model="a", dataset="b", max_seq_len=9, lr=0.1, batch_size=1, grad_accum=1, num_epochs=1.0,
                         output_dir=str(folder)).to_dict()  # fmt: skip
    yield Target("adapter configs", (good["adapter_config.json"],), into("adapter_config.json", adapter), weight=5)
    run_record = json.dumps(record).encode()
    yield Target("run records", (run_record,), into("training_config.json", run), weight=6)
    sft_record = json.dumps({**record, "settings": sft, "script": "dummy_planner.py"}).encode()
    yield Target("run records, SFT", (sft_record,), into("training_config.json", supervised), weight=3)
    yield Target("settings beside a served adapter", (run_record,), into("training_config.json", served), weight=6)
    weights = good["adapter_model.safetensors"][:600]
    use = into("adapter_model.safetensors", lambda: read_adapter_config(str(folder)))
    yield Target("safetensors headers", (good["adapter_model.safetensors"], weights), use, weight=8, json=False)

    row = {
        "row": "direct",
        "question": "a",
        "correct": True,
        "error": None,
        "seconds": 1.0,
        "fingerprint": {"base": "x"},
    }

    def board() -> None:
        for found in stored_rows(folder).values():
            why_not_again(found, {"base": "x"}, [])

    yield Target("scoreboards", ((json.dumps(row) + "\n").encode() * 2,), into("evaluation.jsonl", board), weight=5)
    state = folder / "checkpoint-2"
    state.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (state / name).write_bytes(b"PK\x05\x06" + b"\0" * 18)
    (state / "adapter_model.safetensors").write_bytes(good["adapter_model.safetensors"])
    (state / "trainer_state.json").write_text("{}")

    def checkpoint(data: bytes) -> None:
        (state / "adapter_model.safetensors").write_bytes(data)
        (state / "trainer_state.json").write_bytes(data[-300:])
        complete_checkpoints(folder)

    yield Target("checkpoints", (good["adapter_model.safetensors"], b"{}"), checkpoint, weight=4, json=False)
    merged = place / "merged"
    merged.mkdir()
    report = {"inputs": {"base_model": "a"}, "files": {}, "certificate": {"passed": True}}

    def merge(data: bytes) -> None:
        (merged / "certification.json").write_bytes(data)
        certificate.finished_merge(merged, {"base_model": "a"}, overwrite=False)

    yield Target("reports of a merge", (json.dumps(report).encode(),), merge, weight=4)
    card = b"---\nlicense: mit\ntags:\n- a\ndatasets:\n- a/b\nmodel-index: []\n---\n# Title\ntext\n"

    def read_card(data: bytes) -> None:
        (place / "card.md").write_bytes(data)
        model_card.read_card(str(place / "card.md"))

    yield Target("model cards", (card,), read_card, weight=2, json=False)


def replies(held: contextlib.ExitStack) -> Iterator[Target]:
    """Replies of servers: as parsed JSON, and over real HTTP."""
    from common.servers.client import Endpoint, Server
    from common.servers.model_list import base_model, check_parent, find_adapter
    from common.servers.replies import read_reply, told_error

    def parsed(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):  # from the client's parser; tested over HTTP below
            body = json.loads(data)
            told_error(body)
            read_reply(body, 9)

    server = MisbehavingServer()
    held.callback(server.close)
    sent = [b""]

    def raw(handler: Any, request: dict[str, Any]) -> bool:
        handler.wfile.write(sent[0])
        handler.close_connection = True
        return True

    server.fault = raw
    client = Server(Endpoint(server.url, "--base-url", timeout=3.0, retries=0))
    held.callback(client.runner.close)

    def chat(data: bytes) -> None:
        sent[0] = data
        client.run(client.chat("base", [{"role": "user", "content": "a"}], max_tokens=9, top_logprobs=1))

    def listed(data: bytes) -> None:
        sent[0] = data
        models = client.run(client.models())
        adapter = find_adapter(models, "recursive_reasoner")
        check_parent(models, adapter, base_model(models, None, flag="--model", adapter=adapter.name))

    def http(status: bytes, body: Any) -> bytes:
        content = json.dumps(body).encode()
        return b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\nRetry-After: 1\r\n\r\n" + content

    seeds = tuple(json.dumps(body).encode() for body in (REPLY, ERROR, {"detail": [{"msg": "x"}]}))
    yield Target("server replies", seeds, parsed, weight=70)
    wire = (http(b"200 OK", REPLY), http(b"400 Bad Request", ERROR), http(b"429 Slow", ERROR), http(b"200 OK", ERROR))
    yield Target("server replies over HTTP", wire, chat, weight=0.7)
    yield Target("lists of models over HTTP", (http(b"200 OK", {"data": MODELS}),), listed, weight=0.5)


def commands(place: Path) -> Iterator[Target]:
    """Command lines, up to the point where a script has its settings."""
    import importlib

    from common.settings.inference import ServingArgs
    from common.settings.merge import MergeArgs

    for script, seeds in SCRIPTS.items():
        module = importlib.import_module(script)

        def take(data: bytes, module: Any = module, script: str = script) -> None:
            argv = [word.decode("utf-8", "surrogateescape") for word in data.split(b"\0")]
            parser = module.build_parser()
            options = parser.parse_args(argv)
            if script == "grpo_training":
                module.settle(options).validate()
            elif script == "inference_vllm":
                ServingArgs(**module.given_settings(options, ServingArgs)).validate()
                module.check_mode(options)
            elif script == "merge_and_push":
                given = module.given_settings(options, MergeArgs)
                MergeArgs(**{"repo_name": "a/b", **given}).validate()

        yield Target(f"command lines of {script}.py", seeds, take, weight=1.5, json=False)


def model_folders(place: Path) -> Iterator[Target]:
    """Tokenizer and config of a model folder: load them, render prompts, and save them with an adapter."""
    from common import models, prompts
    from common.runs.adapters import save_tokenizer

    folder, saved = place / "model", place / "saved" / "deep" / "down"
    sample_tokenizer(folder)
    saved.mkdir(parents=True)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    dice = random.Random(0)

    def with_file(name: str) -> Callable[[bytes], None]:
        def take(data: bytes) -> None:
            (folder / name).write_bytes(data)
            try:
                tokenizer = models.load_tokenizer(str(folder))
                prompts.check_shown(tokenizer, [prompts.planner_messages("a question", "short")])
                if dice.random() < 0.3:
                    save_tokenizer(tokenizer, saved)
            finally:
                (folder / name).write_bytes(good[name])

        return take

    for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        seeds: tuple[bytes, ...] = (good[name],)
        if name == "tokenizer_config.json":
            several = {**json.loads(good[name]), "chat_template": [
                {"name": "default", "template": good["chat_template.jinja"].decode()}, {"name": "tool_use", "template": "x"}]}  # fmt: skip
            seeds = (*seeds, json.dumps(several).encode())
        yield Target(f"model folders: {name}", seeds, with_file(name), weight=1.8, json=name.endswith("json"))


def sample_adapter(folder: Path) -> None:
    """Make the config and weights of a small adapter, without a model."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="packaged/SmolLM2-135M-Instruct",
               task_type="CAUSAL_LM").save_pretrained(str(folder))  # fmt: skip
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 8)}, folder / "adapter_model.safetensors")


def sample_tokenizer(folder: Path) -> None:
    """Make a tokenizer with a few hundred tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from common.prompts import PLAIN_CHAT_TEMPLATE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
