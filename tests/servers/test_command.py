"""The command line of a vLLM server."""

from __future__ import annotations

import json

import pytest

from common.servers.vllm import server_command, shown_command


@pytest.mark.parametrize(("rank", "pattern", "served"), [(4, {}, 8), (16, {}, 16), (12, {"q_proj": 20}, 32)])
def test_the_server_command_has_a_rank_that_vllm_takes(tmp_path, rank, pattern, served):
    config = {"peft_type": "LORA", "r": rank, "rank_pattern": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    command = shown_command(server_command("owner/model", tmp_path, cpu=False))
    assert command == (
        "python -m vllm.entrypoints.openai.api_server --model owner/model --enable-lora "
        f"--max-lora-rank {served} --max-loras 2 --lora-modules recursive_reasoner={tmp_path} --port 8000"
    )
