"""TRL's trainer as this project extends it."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from trl.trainer import utils as trl_utils
from trl.trainer.grpo_trainer import GRPOTrainer

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
