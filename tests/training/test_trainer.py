"""TRL's trainer as this project extends it."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import torch
from transformers import Gemma3Config, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3MoeConfig
from trl.trainer import utils as trl_utils
from trl.trainer.grpo_trainer import GRPOTrainer

from common.settings.grpo import TrainingArgs
from common.training.device import device_options
from common.training.trainer import PRIVATE_NAMES, PlannerTrainer

WHERE = "common/training/trainer.py relies on it: look there, and in TRL's source for what took its place"


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_private_methods_are_still_where_they_were(name):
    trl = f"TRL {version('trl')}"
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"{trl} has no GRPOTrainer.{name} any more; {WHERE}"
    parameters = list(inspect.signature(method).parameters)
    expected = ["self", *PRIVATE_NAMES[name]]
    assert parameters[: len(expected)] == expected, f"{trl} changed GRPOTrainer.{name} to {parameters}; {WHERE}"
    assert name in vars(PlannerTrainer), f"PlannerTrainer no longer overrides {name}: strike it from PRIVATE_NAMES"


def test_other_private_names_are_still_where_they_were():
    trl = f"TRL {version('trl')}"
    assert callable(getattr(trl_utils, "_use_triton", None)), f"{trl} has no trl.trainer.utils._use_triton; {WHERE}"
    assert "self._tokenizer" in inspect.getsource(GRPOTrainer.__init__), f"{trl} sets no _tokenizer; {WHERE}"


@pytest.mark.parametrize(
    ("config", "searches"),
    [(LlamaConfig, False), (Qwen2Config, False), (MixtralConfig, None), (Qwen3MoeConfig, None), (Gemma3Config, None)],
)
def test_ddp_searches_for_unused_parameters_only_where_a_pass_may_leave_some_out(config, searches):
    """Without the search, a trained expert that no token went to, or a part for images, would stop all processes."""
    assert device_options(TrainingArgs(), config())["ddp_find_unused_parameters"] is searches


@pytest.mark.parametrize(("native", "bf16", "fp16"), [(True, True, False), (False, False, True)])
def test_a_gpu_without_bf16_of_its_own_trains_in_fp16(monkeypatch, native, bf16, fp16):
    """Only the choice: this machine has no GPU. torch would also run bf16 on a T4, emulated and slow."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    options = device_options(TrainingArgs(), LlamaConfig())
    assert (options["bf16"], options["fp16"], options["use_cpu"]) == (bf16, fp16, False)
