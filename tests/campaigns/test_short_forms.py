"""A short form of each campaign: the same code, with a few kills, faults and questions, and some thousand inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import fault, inputs, kill, soak
from .stage import Stage, shown_keys


@pytest.fixture(scope="module")
def folder(tiny_planner: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all campaigns, with the model that the other tests have trained."""
    place = tmp_path_factory.mktemp("campaigns")
    (place / "tiny-planner").symlink_to(tiny_planner)
    return place


@pytest.fixture
def stage(folder: Path) -> Stage:
    return Stage(folder, minutes=60, seed=1)


def test_kills(stage: Stage) -> None:
    kill.campaign(stage, kills=6, only="^(GRPO|SFT|merge|batch answering)$")
    assert not stage.findings and stage.counts["kills"] == 6, stage.report()


def test_faults(stage: Stage) -> None:
    kinds = "disk full|read-only disk|file handles used up|memory limit of a cgroup|network.*"
    fault.campaign(stage, faults=7, only=f"^({kinds}): (SFT|batch)")
    assert not stage.findings and stage.counts["faults"] == 7, stage.report()


def test_inputs(stage: Stage) -> None:
    inputs.campaign(stage, inputs=5000)
    assert not stage.findings and stage.counts["inputs"] == 5000, stage.report()


def test_long_runs(stage: Stage) -> None:
    soak.campaign(stage, questions=60, kills=1, steps=4)
    assert not stage.findings and stage.counts["soak: questions answered"] == 60, stage.report()


def test_no_planted_key_is_in_what_they_left(folder: Path) -> None:
    assert any((folder / "kill" / "logs").iterdir())
    assert not list(shown_keys(folder))
