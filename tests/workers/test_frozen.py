"""The worker is the base model: measured at start and end of a run; adapters that change the base are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import flags, run_script
from merges import edited
from safetensors.torch import load_file

from common import models
from common.errors import UserError
from common.runs.adapters import check_adds_to_base
from common.workers.frozen import FrozenBase

TARGETS = ["q_proj", "up_proj"]


def wrapped(base, **config):
    """A model with an adapter in which every trainable weight has changed, as after training."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **config}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def base_with_biases():
    """An untrained two-layer Llama with trainable biases in its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = models.load_tokenizer("packaged/SmolLM2-135M-Instruct")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


ADDS = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "bias of its own": {"lora_bias": True, "target_modules": ["q_proj"]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embeddings in full": {"modules_to_save": ["embed_tokens"]},
    "two tokens": {"trainable_token_indices": [5, 6]},
    "adapter on embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapter on the head": {"target_modules": ["lm_head", "q_proj"]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}
CHANGES = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "repeated layers": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("kind", [*ADDS, *CHANGES])
def test_config_and_logits_agree_on_which_adapters_leave_the_base_alone(kind, tmp_path):
    base, tokenizer = base_with_biases()
    frozen = FrozenBase(base, tokenizer)
    model = wrapped(base, **(ADDS | CHANGES)[kind])
    model.save_pretrained(tmp_path)
    if kind in ADDS:
        frozen.measure(model, step=0, adapter_path=str(tmp_path))
        assert frozen.record() == {
            "worker_equals_base": True,
            "largest_logit_difference": 0.0,
            "tolerance": frozen.tolerance,
            "compared_at_steps": [0],
        }
        check_adds_to_base(str(tmp_path))
        return
    with pytest.raises(UserError, match="the model is not its base model") as measured:
        frozen.measure(model, step=0, adapter_path=str(tmp_path))
    with pytest.raises(UserError, match="there would be no base model left") as read:
        check_adds_to_base(str(tmp_path))
    for caught in (measured, read):
        assert caught.value.exit_code == 2 and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert frozen.record()["worker_equals_base"] is False


@pytest.mark.parametrize(
    "config",
    [
        *({"init_lora_weights": value} for value in ("corda", "loftq", "lora_ga", "PiSSA", "one_that_is_new")),
        {"kasa_config": {"beta": 0.0001}},
    ],
)
def test_what_needs_more_than_a_small_model_to_be_tried_is_refused_by_name(config, finished_run, tmp_path):
    _, folder, _ = finished_run
    (name,) = config
    with pytest.raises(UserError, match=str(config[name]) if name == "init_lora_weights" else name):
        check_adds_to_base(str(edited(folder, tmp_path / "warm", config=config)))


def test_a_run_records_that_its_worker_was_the_base_from_start_to_end(finished_run):
    args, folder, _ = finished_run
    record = json.loads((folder / "training_config.json").read_text())
    found = record["frozen_worker"]
    assert found["worker_equals_base"] is True and found["largest_logit_difference"] == 0
    assert found["compared_at_steps"] == [0, args.max_steps]
    assert record["quantised_on"] is None and record["prompt_date"] is None


@pytest.mark.parametrize("script", ["grpo_training.py", "dummy_planner.py"])
def test_a_warm_start_that_changes_the_base_is_one_line(script, finished_run, tiny_args, tmp_path):
    _, folder, _ = finished_run
    warm = edited(folder, tmp_path / "warm", config={"init_lora_weights": "pissa"})
    given = ["--base-model", tiny_args.base_model, "--adapter-path", str(warm), "--output-dir", str(tmp_path / "run")]
    done = run_script(script, *given)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "'pissa'" in done.stderr and not (tmp_path / "run").exists()


def test_a_warm_start_that_brings_embeddings_of_its_own_is_found_by_measuring(finished_run, tiny_args, tmp_path):
    """The config does not show it: PEFT saves whole embeddings with the adapter, and loads them into the base model."""
    _, folder, _ = finished_run
    name = "model.embed_tokens.weight"
    embeddings = load_file(Path(tiny_args.base_model) / "model.safetensors")[name] + 0.01
    warm = edited(folder, tmp_path / "warm", lambda tensors: {**tensors, f"base_model.model.{name}": embeddings})
    tiny_args.adapter_path = str(warm)
    done = run_script("grpo_training.py", *flags(tiny_args))
    assert done.returncode == 2 and "is not its base model" in done.stderr and str(warm) in done.stderr, done.stderr


def test_a_base_that_moves_during_the_run_stops_it_at_the_end(tiny_args):
    from common.problems.questions import load_questions
    from common.training.grpo import build_trainer

    tokenizer = models.load_tokenizer(tiny_args.base_model)
    trainer, _ = build_trainer(tiny_args, load_questions(tiny_args.dataset, limit=10), tokenizer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.001)
    with pytest.raises(UserError, match="at step 3, so the worker was not frozen") as caught:
        trainer.frozen.measure(model, step=3, adapter_path=None)
    assert caught.value.exit_code == 1


def test_a_4bit_base_is_measured_too_and_its_device_is_recorded(tiny_args):
    """PEFT and TRL modify a quantised base model (casts, frozen flags); its logits must not change."""
    tiny_args.use_4bit, tiny_args.max_steps = True, 1
    done = run_script("grpo_training.py", *[flag for flag in flags(tiny_args) if flag != "--no-4bit"], "--4bit")
    assert done.returncode == 0, done.stderr
    record = json.loads((Path(tiny_args.output_dir) / "training_config.json").read_text())
    assert record["frozen_worker"]["worker_equals_base"] is True and record["quantised_on"] == "cpu"
    assert record["frozen_worker"]["largest_logit_difference"] == 0
