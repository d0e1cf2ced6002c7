"""The adapter that a run starts from: its own rank, scale, dropout and layers stay, and flags cannot say otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_script

from common.errors import UserError
from common.runs.adapters import check_adapter_base, with_adapters_lora
from common.settings.grpo import TrainingArgs

OWN: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "layers_to_transform": [3, 4, 5]}


def adapter(folder: Path, **config: Any) -> str:
    """Write an adapter without tensors; returns its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return str(folder)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (OWN, (8, 16, 0.05, 3)),
        ({**OWN, "lora_alpha": 16.0, "layers_to_transform": 5}, (8, 16, 0.05, 1)),
        ({"r": 64, "lora_alpha": 64, "lora_dropout": 0, "layers_to_transform": None}, (64, 64, 0, None)),
    ],
)
def test_a_run_takes_over_what_belongs_to_the_weights_of_its_adapter(tmp_path, config, values):
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_layers")
    args = TrainingArgs(adapter_path=adapter(tmp_path / "warm", **config), lora_layers=10)  # as --demo has it
    same = dict(zip(names, values, strict=True))
    for given in ({}, same):
        found = with_adapters_lora(args, given)
        assert tuple(getattr(found, name) for name in names) == values
    assert with_adapters_lora(TrainingArgs(lora_r=4), {"lora_r": 4}).lora_r == 4, "a new adapter is as the flags say"


@pytest.mark.parametrize("script", ["grpo_training.py", "dummy_planner.py"])
@pytest.mark.parametrize(
    ("flags", "own"),
    [
        (["--lora-r", "16"], "8"),
        (["--lora-alpha", "32"], "16"),
        (["--lora-dropout", "0.1"], "0.05"),
        (["--lora-layers", "4"], "3"),
    ],
)
def test_a_flag_that_the_adapter_contradicts_is_refused_with_the_adapters_value(tmp_path, script, flags, own):
    warm = adapter(tmp_path / "warm", **OWN)
    given = ["--demo", "--output-dir", str(tmp_path / "run"), "--adapter-path", warm, *flags]
    done = run_script(script, *given)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2, line
    assert f"{flags[0]} {flags[1]} does not change the adapter in --adapter-path {warm}, which has {own}: leave" in line
    if script == "grpo_training.py":
        checked = run_script(script, *given, "--check")
        assert checked.returncode == 2 and line in checked.stderr


def test_an_adapter_that_no_run_can_go_on_with_is_told_with_its_file(tmp_path):
    served = TrainingArgs(adapter_path=adapter(tmp_path / "warm", **OWN), vllm_url="http://a/v1")
    with pytest.raises(UserError, match=r"--lora-dropout 0.05 \(in the adapter_config.json of .*without dropout"):
        with_adapters_lora(served, {}).validate()
    for wrong in ({"r": "8"}, {"r": 0}, {"lora_alpha": 1.5}, {"lora_dropout": 2}):
        path = Path(adapter(tmp_path / "warm", **OWN | wrong)) / "adapter_config.json"
        with pytest.raises(UserError, match=f"{path}: --lora-"):
            with_adapters_lora(served, {})


CACHED = "/home/me/.cache/huggingface/hub/models--owner--Model-7B/snapshots/0a1b2c3d"


@pytest.mark.parametrize(
    ("recorded", "record", "named"),
    [
        (CACHED, {}, "owner/Model-7B"),
        ("/home/me/.cache/huggingface/hub/models--gpt2/snapshots/0a1b2c3d/", {}, "gpt2"),
        ("/home/me/.cache/here/SmolLM2", {"settings": {"base_model": "packaged/SmolLM2"}}, "packaged/SmolLM2"),
        ("/home/me/.cache/here/SmolLM2", {"settings": {"base_model": "owner/Other"}}, "/home/me/.cache/here/SmolLM2"),
        ("owner/Model-7B", {"settings": None}, "owner/Model-7B"),
    ],
)
def test_another_base_model_is_told_by_the_name_that_a_user_gives(tmp_path, recorded, record, named):
    warm = adapter(tmp_path / "warm", base_model_name_or_path=recorded)
    (tmp_path / "warm" / "training_config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"was trained on {named}, not on x/y: use --base-model {named}$"):
        check_adapter_base(warm, "x/y")
    check_adapter_base(warm, named)
    check_adapter_base(warm, recorded)


def test_a_copy_in_the_hubs_cache_and_the_hub_id_are_one_base_model(tmp_path):
    check_adapter_base(adapter(tmp_path / "warm", base_model_name_or_path="owner/Model-7B"), CACHED)
    check_adapter_base(adapter(tmp_path / "warm", base_model_name_or_path=CACHED), "/data/model-7b")


def test_peft_is_not_told_where_the_base_was_in_training(tmp_path):
    """It would warn that the name has changed wherever the base lies elsewhere now."""
    from common import models

    folder = adapter(tmp_path / "warm", base_model_name_or_path=CACHED, **OWN, target_modules=["q_proj"])
    assert models.lora_config(TrainingArgs(adapter_path=folder), None).base_model_name_or_path is None
