"""Helpers for the tests of merge_and_push.py: merge in this process, and read what is on disk afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_and_push
from common.errors import UserError

REPO = ["--repo-name", "user/planner", "--no-push"]


def merge(adapter, target, *flags: str) -> int:
    """Run the script's `main` in this process, where torch is already imported. Returns the exit code."""
    return merge_and_push.main(["--adapter-path", str(adapter), "--local-save-path", str(target), *REPO, *flags])


def refused(adapter, target, *flags: str) -> UserError:
    """The error with which the script refuses a merge."""
    with pytest.raises(UserError) as caught:
        merge(adapter, target, *flags)
    return caught.value


def report_of(folder: Path) -> dict:
    """The certificate in the folder of a merged model."""
    return json.loads((folder / "certification.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder by name."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def trained(base: str, target: Path, *, add: int = 0, save_embeddings: bool | str = "auto", **config) -> Path:
    """Make an adapter as training leaves it: every trainable weight has changed, and the tokenizer is with it.

    Args:
        base: folder of the base model.
        target: folder of the adapter.
        add: number of tokens that training added.
        save_embeddings: whether PEFT writes whole embeddings too.
        config: fields of LoraConfig.

    Returns:
        The folder.
    """
    from peft import LoraConfig, get_peft_model

    from common import models
    from common.runs.adapters import save_tokenizer

    model, tokenizer = models.load_base(base, four_bit=False), models.load_tokenizer(base)
    if add:
        tokenizer.add_tokens([f"<added_{number}>" for number in range(add)])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    peft = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config})
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    peft.save_pretrained(target, save_embedding_layers=save_embeddings)
    save_tokenizer(tokenizer, target)
    return target


def edited(adapter, target: Path, change=None, config=None) -> Path:
    """Make a copy of an adapter with changed tensors or another config. Returns its folder."""
    shutil.copytree(adapter, target, ignore=shutil.ignore_patterns("checkpoint-*"))
    if change is not None:
        tensors = load_file(target / "adapter_model.safetensors")
        save_file(change(tensors) or tensors, target / "adapter_model.safetensors", {"format": "pt"})
    if config is not None:
        path = target / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target
