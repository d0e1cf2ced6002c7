"""Trained weights are fp32, and a 4-bit run learns and resumes like one without quantisation."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import flags, run_script
from safetensors.torch import load_file

from common import models
from common.problems.questions import load_questions
from common.training.grpo import build_trainer


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_a_small_step_moves_every_trained_weight(tiny_args, four_bit):
    """At a learning rate of 1e-5 most bf16 weights would not change: half the distance of two bf16 numbers is larger."""
    tiny_args.use_4bit, tiny_args.lr, tiny_args.max_steps = four_bit, 1e-5, 2
    trainer, _ = build_trainer(
        tiny_args, load_questions(tiny_args.dataset, limit=4), models.load_tokenizer(tiny_args.base_model)
    )
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    before = {name: value.detach().clone() for name, value in trained.items()}
    trainer.train()
    moved = [bool((value != before[name]).float().mean() > 0.9) for name, value in trained.items() if "lora_B" in name]
    assert all(moved), f"{sum(moved)} of {len(moved)} matrices moved"


def test_a_4bit_run_resumes_bit_for_bit(tiny_args, tmp_path):
    tiny_args.max_steps, tiny_args.save_steps = 2, 1
    whole = tmp_path / "run"
    given = ["--4bit" if flag == "--no-4bit" else flag for flag in flags(tiny_args)]
    done = run_script("grpo_training.py", *given)
    assert done.returncode == 0, done.stderr
    shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-2")
    done = run_script("grpo_training.py", "--output-dir", str(tmp_path / "resumed"), "--resume")
    assert done.returncode == 0, done.stderr
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "resumed").items())


def test_the_kl_penalty_of_a_warm_start_is_measured_against_the_warm_start(tiny_args, finished_run):
    """Before any training the policy equals its reference, so the KL is 0; against the base model it would not be."""
    tiny_args.adapter_path, tiny_args.beta, tiny_args.max_steps = str(finished_run[1]), 0.1, 1
    tiny_args.cpu_dtype = "float32"  # bf16 rounds policy and reference apart, by about 3e-5
    trainer, _ = build_trainer(
        tiny_args, load_questions(tiny_args.dataset, limit=4), models.load_tokenizer(tiny_args.base_model)
    )
    trainer.train()
    first = next(log for log in trainer.state.log_history if "kl" in log)
    assert abs(first["kl"]) < 1e-6
