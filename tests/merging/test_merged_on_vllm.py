"""The merged model on a real vLLM server, without LoRA or this project, writes the same plans as adapter on base."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import merge_and_push
from common import prompts
from common.merging import certificate


@pytest.fixture(scope="module")
def merged(smollm2_adapter, tmp_path_factory) -> Path:
    """The real model and its adapter, merged."""
    target = tmp_path_factory.mktemp("served") / "merged"
    flags = ["--adapter-path", str(smollm2_adapter), "--local-save-path", str(target)]
    assert merge_and_push.main([*flags, "--repo-name", "user/name", "--no-push"]) == 0
    return target


@pytest.fixture(scope="module")
def served(merged, vllm_server) -> Iterator[str]:
    """Address of a vLLM server of the merged folder."""
    flags = "--host 127.0.0.1 --served-model-name planner --dtype float32 --max-model-len 1024 --enforce-eager"
    with vllm_server(["-m", "vllm.entrypoints.openai.api_server", "--model", str(merged), *flags.split()]) as address:
        yield f"{address}/chat/completions"


def test_vllm_serves_the_merged_model_and_it_writes_the_plans_of_adapter_on_base(merged, served):
    report = json.loads((merged / certificate.REPORT).read_text())
    for plan in report["certificate"]["plans"]:
        asked = {
            "model": "planner",
            "messages": prompts.planner_messages(plan["question"], "short"),
            "temperature": 0,
            "max_tokens": certificate.MAX_PLAN_TOKENS,
        }
        request = urllib.request.Request(
            served, json.dumps(asked).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        answer = json.load(urllib.request.urlopen(request, timeout=300))
        assert answer["choices"][0]["message"]["content"] == plan["adapter"], plan["question"]
