"""The merged model on a real vLLM server, without this project, LoRA or adapter: the same plans as adapter on base."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

import merge_and_push
from common import certificate, prompts

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_SECONDS = 900  # about one minute on an idle machine


@pytest.fixture(scope="module")
def merged(smollm2_adapter, tmp_path_factory) -> Path:
    """The real model and its adapter, merged."""
    target = tmp_path_factory.mktemp("served") / "merged"
    flags = ["--adapter-path", str(smollm2_adapter), "--local-save-path", str(target)]
    assert merge_and_push.main([*flags, "--repo-name", "user/name", "--no-push"]) == 0
    return target


@pytest.fixture(scope="module")
def served(merged) -> str:
    """Address of a vLLM server of the merged folder (DESIGN, section 5)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = merged.parent / "vllm.log"
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(merged), "--host", "127.0.0.1",
             "--port", str(port), "--served-model-name", "planner", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"],
            stdout=stream, stderr=subprocess.STDOUT, cwd=merged.parent, env={**os.environ, **quiet},
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "vLLM did not start: " + log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no vLLM here: `make .venv-vllm/.installed` makes .venv-vllm")
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
