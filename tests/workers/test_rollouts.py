"""Rollouts from servers: which server gets which prompt, which samples a failure costs, and when the run stops."""

from __future__ import annotations

import time

import pytest
from misbehaving import LoraServer

from common.errors import UserError
from common.servers.client import Endpoint, Server
from common.settings.grpo import TrainingArgs
from common.workers.remote import check_worker
from common.workers.rollouts import RunStoppedError, ServedPlanner, check_rollout_server

PROMPTS = [[1, 1], [1, 1], [2, 2], [2, 2], [3, 3], [3, 3]]


def planner(servers: list[LoraServer], folder, **settings) -> ServedPlanner:
    args = TrainingArgs(
        vllm_url=",".join(server.url for server in servers), output_dir=str(folder), vllm_patience=0, temperature=0.9, **settings
    )  # fmt: skip
    found = ServedPlanner.from_settings(
        args, save=lambda folder: (folder / "weights").touch(), end_ids=(2,), step=lambda: 4
    )
    found.sync_weights()
    return found


def test_a_groups_completions_come_from_one_server_each_with_its_own_seed(two, tmp_path):
    served = planner(two, tmp_path)
    prompts, completions, logprobs, extra = served.generate(PROMPTS, None, 2)
    assert (prompts, completions, extra) == (PROMPTS, [[7, 2]] * 6, None)
    assert logprobs == [[[-0.5], [None]]] * 6
    assert [sorted(request["prompt"] for request in server.sampled) for server in two] == [
        [[1, 1], [1, 1], [3, 3], [3, 3]],
        [[2, 2], [2, 2]],
    ]
    asked = two[0].sampled + two[1].sampled
    assert len({request["seed"] for request in asked}) == 6
    # Independent of the model's own sampling defaults.
    assert all((r["temperature"], r["top_p"], r["top_k"], r["min_p"]) == (0.9, 1.0, 0, 0.0) for r in asked)
    seeds = {request["seed"] for request in asked}
    again = planner(two, tmp_path)
    again.generate(PROMPTS, None, 2)
    assert {request["seed"] for request in two[0].sampled[4:] + two[1].sampled[2:]} == seeds, (
        "a repeated step asks the same"
    )
    again.generate(PROMPTS, None, 2)
    assert not seeds & {request["seed"] for request in two[1].sampled[4:]}, "more rollouts for one step are others"


def test_a_server_that_was_started_anew_gets_the_version_again_and_no_sample_is_lost(two, tmp_path):
    served = planner(two, tmp_path)
    before = dict(two[1].loaded)
    two[1].loaded.clear()
    assert served.generate(PROMPTS, None, 2)[1] == [[7, 2]] * 6
    assert served.errors == [None] * 6 and two[1].loaded == before


def test_a_server_that_takes_requests_and_never_replies_costs_two_time_limits_at_most(two, tmp_path):
    """It lists its models all the while, as vLLM does with a dead engine: once more asked, then its samples are masked."""
    served = planner(two, tmp_path, vllm_timeout=1.0)
    adapters, asked = two[1].fault, []

    def hangs(handler, request):
        if handler.path.endswith("/completions"):
            asked.append(request["prompt"])
            time.sleep(3)
        return adapters(handler, request)

    two[1].fault = hangs
    served.generate(PROMPTS, None, 2)
    assert ["no reply within 1 s" in (error or "") for error in served.errors] == [0, 0, 1, 1, 0, 0]
    assert "--vllm-timeout" in str(served.errors[2]) and len(asked) <= 4


def test_a_completion_that_fails_for_good_is_one_end_token_and_says_why(two, tmp_path):
    served = planner(two, tmp_path)
    two[1].too_long = [[2, 2]]
    _, completions, logprobs, _ = served.generate(PROMPTS, None, 2)
    assert completions == [[7, 2]] * 2 + [[2]] * 2 + [[7, 2]] * 2 and logprobs[2] == [[None]]
    assert [error is not None and "context length" in error for error in served.errors] == [0, 0, 1, 1, 0, 0]
    two[0].too_long = [[1, 1], [3, 3]]
    with pytest.raises(RunStoppedError, match="no completion from the servers") as caught:
        served.generate(PROMPTS, None, 2)
    assert caught.value.exit_code == 1


def test_a_server_that_cannot_take_adapters_is_told_before_a_model_is_loaded(two):
    server = Server(Endpoint(two[0].url, retries=0, flag="--vllm-url"))
    server.run(check_rollout_server(server, "base", 1.0))
    two[0].refusal = (404, {"detail": "Not Found"})
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1") as caught:
        server.run(check_rollout_server(server, "base", 1.0))
    assert caught.value.exit_code == 2


def test_an_adapter_folder_that_cannot_be_written_is_told_before_a_model_is_loaded(two, tmp_path):
    (tmp_path / "file").write_text("")
    args = TrainingArgs(vllm_url=two[0].url, vllm_adapter_dir=str(tmp_path / "file" / "adapters"))
    with pytest.raises(UserError, match=r"--vllm-adapter-dir .* is a file: name a folder"):
        check_worker(args)
