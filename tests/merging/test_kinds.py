"""Every kind of LoRA adapter. A merge is certified, or refused with the right advice if it is not possible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merges import merge, refused, report_of, trained, weights_of
from safetensors.torch import load_file

from common import models
from common.merging.model_card import _training, metadata

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "rsLoRA": {"use_rslora": True, "target_modules": ALL},
    "rank and alpha patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"down_proj": 32},
    },
    "DoRA": {"use_dora": True, "target_modules": ALL},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "all biases": {"bias": "all", "target_modules": ["q_proj", "up_proj"]},
    "a bias of its own": {"lora_bias": True},
    "all-linear": {"target_modules": "all-linear"},
    "the last layer only": {"target_modules": ALL, "layers_to_transform": [1]},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
    "norm in full": {"modules_to_save": ["norm"]},
    "trained tokens": {"trainable_token_indices": [5, 6]},
}


@pytest.fixture(scope="session")
def biased_base(tiny_planner, tmp_path_factory) -> str:
    """The tiny planner with biases in its attention, like a Qwen model."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny_planner, attention_bias=True)
    model = LlamaForCausalLM(config)
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(tiny_planner).state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
    folder = tmp_path_factory.mktemp("biased") / "tiny-planner"
    model.save_pretrained(folder)
    models.load_tokenizer(tiny_planner).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters_that_merge(kind, biased_base, tmp_path):
    adapter = trained(biased_base, tmp_path / "adapter", **KINDS[kind])
    assert merge(adapter, tmp_path / "merged", "--base-model", biased_base) == 0
    found = report_of(tmp_path / "merged")["certificate"]
    assert found["passed"] and found["equal_plans"] == 8
    assert found["adapter_effect"]["max_logit"] > 100 * found["difference"]["max_logit"], (
        "the adapter must do something"
    )


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_full_copy_of_tied_embeddings_comes_out_untied_with_both_matrices(modules, tiny_planner, tmp_path):
    adapter = trained(tiny_planner, tmp_path / "adapter", modules_to_save=modules)
    assert json.loads((Path(tiny_planner) / "config.json").read_text())["tie_word_embeddings"] is True
    assert merge(adapter, tmp_path / "merged") == 0
    assert report_of(tmp_path / "merged")["certificate"]["passed"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    weights = weights_of(tmp_path / "merged")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_end_of_tied_embeddings_is_not_certified(module, tiny_planner, tmp_path):
    """PEFT merges it into the shared matrix, so the other layer changes too: exit code 4, and nothing is pushed."""
    adapter = trained(tiny_planner, tmp_path / "adapter", target_modules=[module, "q_proj"])
    error = refused(adapter, tmp_path / "merged")
    assert error.exit_code == 4 and "tied embeddings" in str(error)
    assert report_of(tmp_path / "merged")["certificate"]["passed"] is False


@pytest.mark.parametrize(
    "config",
    [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [49152, 49153]}],
    ids=["resized", "trained in full", "trained tokens"],
)
@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_added_tokens_come_with_the_embeddings_that_the_adapter_brings(config, four_bit, tiny_planner, tmp_path):
    adapter = trained(tiny_planner, tmp_path / "adapter", add=2, **config)
    (adapter / "training_config.json").write_text(
        json.dumps({"settings": {}, "four_bit": four_bit, "quantised_on": "another GPU"})
    )
    assert merge(adapter, tmp_path / "merged") == 0
    report = report_of(tmp_path / "merged")
    assert report["certificate"]["passed"] and report["quantised_on"] == ("cpu" if four_bit else None)
    tokenizer = models.load_tokenizer(str(tmp_path / "merged"))
    rows = json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"]
    assert len(tokenizer) == rows == 49154
    brought = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.embed_tokens"
    whole = brought.get(f"{stem}.weight")
    new = brought[f"{stem}.token_adapter.trainable_tokens_delta"] if whole is None else whole[-2:]
    assert torch.allclose(weights_of(tmp_path / "merged")["model.embed_tokens.weight"][-2:], new, atol=1e-6)


def test_added_tokens_without_embeddings_are_refused_with_what_to_do(tiny_planner, tmp_path):
    adapter = trained(tiny_planner, tmp_path / "adapter", add=2, save_embeddings=False)
    error = refused(adapter, tmp_path / "merged")
    assert error.exit_code == 2 and "49154 tokens" in str(error) and "no embeddings for the 2 added" in str(error)
    assert "save_embedding_layers=True" in str(error) and "--base-model" not in str(error)
    assert not (tmp_path / "merged").exists()


def test_a_warm_start_with_added_tokens_is_told_to_merge_first(tiny_planner, tmp_path):
    from common.errors import UserError
    from common.settings.grpo import TrainingArgs

    adapter = trained(tiny_planner, tmp_path / "adapter", add=2)
    base = models.load_base(tiny_planner, four_bit=False)
    from peft import get_peft_model

    args = TrainingArgs(base_model=tiny_planner, adapter_path=str(adapter))
    model = get_peft_model(base, models.lora_config(args, base))
    with pytest.raises(UserError, match=r"merge it with merge_and_push\.py --no-push"):
        models.load_adapter_weights(model, str(adapter))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dataset": "openai/gsm8k"}, ["openai/gsm8k"]),
        ({"dataset": "data/train.jsonl"}, None),
        ({"dataset": "data/TRAIN.PARQUET"}, None),
        ({"dataset": "./data"}, None),
        ({"dataset": "data/gsm8k", "data_source": "local"}, None),
        ({"dataset": "openai/gsm8k", "data_source": "hub"}, ["openai/gsm8k"]),
        ({"dataset": "generated:shares", "data_source": "generated"}, None),
        ({"dataset": "reasoning-gym:chain_sum"}, None),
        ({"dataset": "multi:openai/gsm8k?parts=2", "data_source": "hub"}, ["openai/gsm8k"]),
        ({"dataset": "multi:../data/gsm8k?parts=2", "data_source": "local"}, None),
    ],
)
def test_a_card_names_data_sets_of_the_hub_only(settings, named):
    record = {"settings": {"dataset": settings["dataset"]}, "data_source": settings.get("data_source")}
    evaluation = {"rows": {"trained planner": {"accuracy": 0.5}}}
    data = metadata("user/planner", {}, record, evaluation).to_dict()
    assert data.get("datasets") == named
    told = data["model-index"][0]["results"][0]["dataset"]["name"]
    assert ("/" in told) == (named is not None), "no folder of the author's machine"


def test_a_card_shows_no_folder_of_the_authors_machine():
    stored = {
        "dataset": "multi:/home/me/gsm8k.jsonl?parts=2",
        "base_model": "/home/me/model",
        "eval_dataset": "/home/a/b",
    }
    shown = _training({"settings": stored})
    assert "home" not in shown and "multi:gsm8k.jsonl?parts=2" in shown
