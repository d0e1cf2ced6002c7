"""Engines that split the weights between processes are refused in one line, before anything is loaded."""

from __future__ import annotations

import json

import pytest
from conftest import run_script

from common.errors import UserError
from common.processes.engines import check_engine

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}


@pytest.mark.parametrize(
    ("script", "environment", "named"),
    [
        ("grpo_training.py", {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ("dummy_planner.py", {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed ZeRO-3"),
    ],
)
def test_an_engine_that_shards_weights_is_refused_in_one_line(script, environment, named, tmp_path):
    done = run_script(script, "--demo", "--output-dir", str(tmp_path / "run"), env=environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"set to {named}," in line and "use DeepSpeed ZeRO-2" in line
    assert not (tmp_path / "run").exists()


def test_deepspeeds_own_file_decides_the_stage(monkeypatch, tmp_path):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    check_engine()
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    check_engine()  # accelerate's default stage is 2
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    check_engine()
    file = tmp_path / "ds.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    for content, problem in (
        (json.dumps({"zero_optimization": {"stage": 2}}), None),
        (json.dumps({"zero_optimization": {"stage": 3}}), "ZeRO-3"),
        (json.dumps({"zero_optimization": {"stage": "auto"}}), "zero stage is 'auto'"),
        ("{}", "names no zero_optimization.stage"),
        ("{", "names no zero_optimization.stage"),
    ):
        file.write_text(content)
        if problem is None:
            check_engine()
        else:
            with pytest.raises(UserError, match=problem):
                check_engine()
