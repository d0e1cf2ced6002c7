"""The command line of a vLLM server."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import free_port

from common.errors import UserError
from common.servers.vllm import check_own_server, server_command, shown_command, training_command
from common.settings.grpo import TrainingArgs


@pytest.mark.parametrize(("rank", "pattern", "served"), [(4, {}, 8), (16, {}, 16), (12, {"q_proj": 20}, 32)])
def test_the_server_command_has_a_rank_that_vllm_takes(tmp_path, monkeypatch, rank, pattern, served):
    config = {"peft_type": "LORA", "r": rank, "rank_pattern": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    monkeypatch.chdir(tmp_path.parent)
    command = shown_command(server_command("owner/model", tmp_path.name, cpu=False))
    assert command == (
        "python -m vllm.entrypoints.openai.api_server --model owner/model --enable-lora "
        f"--max-lora-rank {served} --max-loras 2 --host 127.0.0.1 --lora-modules recursive_reasoner={tmp_path} --port 8000"
    )


def test_the_command_of_a_training_run_has_room_for_one_version_and_tells_log_probabilities_as_sampled():
    cpu = training_command("/models/base", 4, port=8100, context=1024, cpu=True)
    shown = " ".join(cpu)
    assert "--max-lora-rank 8 --max-loras 2 --host 127.0.0.1 --max-cpu-loras 2 --dtype float32" in shown
    assert "--logprobs-mode processed_logprobs --generation-config vllm --max-model-len 1024" in shown
    assert "--served-model-name base" in shown and "--lora-modules" not in shown
    gpu = " ".join(training_command("b", 16, port=8100, context=4096, cpu=False, four_bit=True, gpu_memory=0.3))
    assert "--gpu-memory-utilization 0.3" in gpu and "--quantization bitsandbytes" in gpu and "--dtype" not in gpu
    with pytest.raises(UserError, match="LoRA rank 600 is too high"):
        training_command("b", 600, port=8100, context=4096, cpu=True)


@pytest.mark.parametrize(
    ("gpu", "four_bit", "lacking"),
    [(False, None, "vllm"), (False, True, "vllm"), (True, None, "vllm, vllm_bnb_plugin"), (True, False, "vllm")],
)
def test_an_environment_without_what_the_server_needs_is_told_before_it_is_started(monkeypatch, gpu, four_bit, lacking):
    """This Python has bitsandbytes and no vLLM. On a GPU the base is in 4 bits by default, which vLLM does by a plugin."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = TrainingArgs(vllm_python=sys.executable, vllm_port=free_port(), use_4bit=four_bit)
    with pytest.raises(UserError, match=rf" lacks {lacking}: pip install -r requirements-vllm.txt"):
        check_own_server(args)


@pytest.mark.parametrize("name", ["words.txt", "."])
def test_what_is_no_python_is_told(monkeypatch, tmp_path, name):
    (tmp_path / "words.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"--vllm-python {name} is no Python that runs"):
        check_own_server(TrainingArgs(vllm_python=name, vllm_port=free_port()))
