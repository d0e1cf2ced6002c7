"""The fingerprint of a scoreboard row changes with everything that determines the row, and with nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import models
from common.evaluation.fingerprint import RunFingerprints, base_content, difference
from common.problems.questions import load_questions
from common.runs.adapters import save_adapter
from common.servers.client import Endpoint, Server
from common.settings.grpo import TrainingArgs
from common.workers.local import FrozenWorker
from common.workers.remote import ServerWorker


@pytest.fixture(scope="module")
def planner(tiny_planner, tmp_path_factory):
    """(PEFT model, tokenizer, folder of its adapter)."""
    from peft import get_peft_model

    tokenizer = models.load_tokenizer(tiny_planner)
    base = models.load_base(tiny_planner, four_bit=False)
    model = get_peft_model(base, models.lora_config(TrainingArgs(base_model=tiny_planner), base))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, tokenizer, folder)
    return model, tokenizer, folder


def fingerprints(args, planner, questions=None, worker=None):
    model, tokenizer, folder = planner
    questions = questions or load_questions(args.dataset, limit=10)
    made = RunFingerprints(args, model, tokenizer, worker or FrozenWorker(model, tokenizer), questions)
    return {"direct": made.direct(), "planner": made.planner(str(folder)), "vote": made.vote(3, 0.7)}


@pytest.mark.parametrize(
    ("changed", "direct", "planner_only"),
    [
        ({"worker_style": "worked"}, ["worker prompts"], []),
        ({"worker_max_tokens": 9}, ["worker's limit"], []),
        ({"use_4bit": True}, ["worker"], ["base"]),
        ({"planner_style": "full"}, [], ["planner prompts"]),
        ({"max_completion_length": 61}, [], ["planner's limits"]),
        ({"max_subproblems": 7}, [], ["planner's limits"]),
        ({"max_subproblem_chars": 99}, [], ["planner's limits"]),
        ({"embedding_model": "another"}, [], ["embedding model"]),
        ({"output_dir": "elsewhere", "max_steps": 9, "lr": 1.0, "worker_batch_tokens": 99}, [], []),
    ],
)
def test_settings(tiny_args, planner, changed, direct, planner_only):
    before, after = fingerprints(tiny_args, planner), fingerprints(replace(tiny_args, **changed), planner)
    assert difference(before["direct"], after["direct"]) == direct
    assert difference(before["planner"], after["planner"]) == [*direct, *planner_only]
    assert difference(before["vote"], after["vote"]) == direct


def test_the_seed_of_the_votes_and_the_answers_to_the_questions(tiny_args, planner):
    before = fingerprints(tiny_args, planner)
    assert difference(before["vote"], fingerprints(replace(tiny_args, seed=1), planner)["vote"]) == ["votes"]
    questions = load_questions(tiny_args.dataset, limit=10)
    questions[1] = replace(questions[1], answer="#### 12345")
    after = fingerprints(tiny_args, planner, questions)
    assert difference(before["direct"], after["direct"]) == ["questions"]


def test_the_adapter_is_told_by_its_weights_and_its_config(tiny_args, planner, tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer, folder = planner
    before = fingerprints(tiny_args, planner)["planner"]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert difference(before, fingerprints(tiny_args, (model, tokenizer, copy))["planner"]) == []
    config = copy / "adapter_config.json"
    stored = json.loads(config.read_text())
    assert len(stored["target_modules"]) > 1
    config.write_text(json.dumps({**stored, "target_modules": stored["target_modules"][::-1]}))  # PEFT's order varies
    assert difference(before, fingerprints(tiny_args, (model, tokenizer, copy))["planner"]) == []
    weights = load_file(copy / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1
    save_file(weights, copy / "adapter_model.safetensors")
    assert difference(before, fingerprints(tiny_args, (model, tokenizer, copy))["planner"]) == ["adapter"]
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config.write_text(config.read_text().replace('"lora_alpha": 32', '"lora_alpha": 64'))
    assert difference(before, fingerprints(tiny_args, (model, tokenizer, copy))["planner"]) == ["adapter"]


def test_the_base_is_told_by_its_content_wherever_it_lies(tiny_planner, tmp_path):
    from safetensors.torch import load_file, save_file

    before = base_content(tiny_planner, None)
    copy = tmp_path / "base"
    shutil.copytree(tiny_planner, copy)
    assert base_content(str(copy), None) == before
    (path,) = copy.glob("*.safetensors")
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][5, 5] += 1  # same names, same shapes, same size
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == next(Path(tiny_planner).glob("*.safetensors")).stat().st_size
    assert base_content(str(copy), None) != before
    assert base_content("owner/name", "0123abc") == "0123abc"
    assert base_content("owner/name", None) is None


def test_blocks_of_a_large_file_lie_close_enough_for_any_layer_to_show(tmp_path):
    from common.evaluation.fingerprint import _sampled

    path, size = tmp_path / "model.safetensors", 200_000_000
    with path.open("wb") as stream:
        stream.truncate(size)  # zeros that take no disk space (a sparse file)
    before = _sampled(path)
    for place in (0, size // 3, size - 1_000_000):
        with path.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"1" * 1_000_000)
        after = _sampled(path)
        assert after != before, place
        before = after


def test_the_base_in_another_precision_and_a_worker_on_a_server_are_others(tiny_args, planner, server):
    model, before = planner[0], fingerprints(tiny_args, planner)
    remote = ServerWorker(Server(Endpoint(server.url)), "base", style=tiny_args.worker_style)
    after = fingerprints(tiny_args, planner, worker=remote)
    assert difference(before["planner"], after["planner"]) == ["worker", "worker prompts"]
    model.to(torch.bfloat16)
    try:
        after = fingerprints(tiny_args, planner)
    finally:
        model.to(torch.float32)
    assert difference(before["direct"], after["direct"]) == ["worker"]
