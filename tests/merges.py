"""Merging in this process, and what it leaves on disk: for the tests of merge_and_push.py."""

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
    """The script's own `main`, in this process: torch is imported here already."""
    return merge_and_push.main(["--adapter-path", str(adapter), "--local-save-path", str(target), *REPO, *flags])


def refused(adapter, target, *flags: str) -> UserError:
    with pytest.raises(UserError) as caught:
        merge(adapter, target, *flags)
    return caught.value


def report_of(folder: Path) -> dict:
    return json.loads((folder / "certification.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def edited(adapter, target: Path, change=None, config=None) -> Path:
    """A copy of an adapter with other tensors or another config."""
    shutil.copytree(adapter, target, ignore=shutil.ignore_patterns("checkpoint-*"))
    if change is not None:
        tensors = load_file(target / "adapter_model.safetensors")
        save_file(change(tensors) or tensors, target / "adapter_model.safetensors", {"format": "pt"})
    if config is not None:
        path = target / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target
