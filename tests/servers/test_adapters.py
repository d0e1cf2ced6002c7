"""Adapter versions on servers: on all or none, older ones unloaded, and each refusal explained in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from misbehaving import LoraServer

from common.errors import UserError
from common.servers.adapters import AdapterServers
from common.servers.client import Endpoint, Server
from common.workers.rollouts import PolicyCheck, RunStoppedError, request_seed

NO_ROUTE = (404, {"detail": "Not Found"})
NO_LORA = (500, {"error": {"message": "LoRA is not enabled. Use --enable-lora to enable LoRA.", "code": 500}})
RANK = (500, {"error": {"message": "Call to add_lora method failed: LoRA rank 32 is greater than max_lora_rank 16."}})
NO_FOLDER = (404, {"error": {"message": "Loading lora planner failed: No adapter found for /x", "code": 404}})


def adapters(servers: list[LoraServer], folder: Path, patience: float = 0.0) -> AdapterServers:
    first = Server(Endpoint(servers[0].url, retries=0, flag="--vllm-url"))
    others = [Server(Endpoint(s.url, retries=0, flag="--vllm-url"), first.runner) for s in servers[1:]]
    return AdapterServers([first, *others], folder, patience=patience)


def saving(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "weights").write_text(text) and None


def test_each_version_has_its_own_name_and_folder_and_the_one_before_outlives_it_by_one_swap(two, tmp_path):
    versions = adapters(two, tmp_path / "v")
    names, folders = [], []
    for step in range(4):
        names.append(versions.publish(saving(str(step))))
        assert [list(server.loaded) for server in two] == [[names[-1]]] * 2, "one version, on both"
        folders.append(Path(two[0].loaded[names[-1]]))
        assert folders[-1].is_absolute() and (folders[-1] / "weights").read_text() == str(step)
        assert sorted((tmp_path / "v").iterdir()) == sorted(folders[-2:])
    assert len(set(names)) == len(set(folders)) == 4
    versions.close()
    assert not two[0].loaded and not two[1].loaded and not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (NO_ROUTE, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (NO_LORA, "without --enable-lora"),
        (RANK, "LoRA rank 32 is greater than max_lora_rank 16: restart the server with a --max-lora-rank"),
        (NO_FOLDER, "--vllm-adapter-dir must be on a disk that the server has"),
        (None, "no answer"),
    ],
)
def test_what_one_server_refuses_no_server_keeps(two, tmp_path, refusal, words):
    versions = adapters(two, tmp_path)
    before = versions.publish(saving("first"))
    two[1].refusal = refusal
    with pytest.raises(UserError, match=words) as caught:
        versions.publish(saving("second"))
    assert "\n" not in str(caught.value) and two[1].url in str(caught.value)
    assert versions.current == before
    assert [list(server.loaded) for server in two] == [[before]] * 2, "the version before still answers"
    two[1].refusal = False
    assert list(two[1].loaded) != [versions.publish(saving("third"))]
    assert len(two[0].loaded) == len(two[1].loaded) == 1


def test_a_server_that_lost_its_adapters_gets_the_current_one_again(two, tmp_path):
    versions = adapters(two, tmp_path, patience=30)
    name = versions.publish(saving("first"))
    two[1].loaded.clear()
    server = versions.servers[1]
    server.run(versions.restore(server))
    assert list(two[1].loaded) == [name]


def test_what_a_killed_run_left_is_cleared_and_nothing_else(two, tmp_path):
    versions = adapters(two, tmp_path / "v")
    versions.publish(saving("left behind"))
    two[0].loaded |= {"recursive_reasoner": "/a", "planner-of-another": "/b/planner-of-another"}
    adapters(two, tmp_path / "v").clear()
    assert sorted(two[0].loaded) == ["planner-of-another", "recursive_reasoner"]
    assert not two[1].loaded and not (tmp_path / "v").exists()


def test_every_completion_of_a_run_has_a_seed_of_its_own():
    seeds = {request_seed(42, step, calls, place) for step in range(20) for calls in range(2) for place in range(64)}
    assert len(seeds) == 20 * 2 * 64 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(42, 3, 0, 5) == request_seed(42, 3, 0, 5) != request_seed(43, 3, 0, 5)


@pytest.mark.parametrize("gap", [2e-3, float("nan")])
def test_a_gap_beyond_rounding_stops_the_run_with_exit_code_3(gap):
    check = PolicyCheck.of(None, full_precision=True)
    check.check(5e-5, 9e-4, "the server")
    with pytest.raises(RunStoppedError, match="the server") as caught:
        check.check(gap / 3, gap, "the server")
    assert caught.value.exit_code == 3
    PolicyCheck.of(None, full_precision=False).check(0.05, 2.0, "half precision: one token may differ by much")
    PolicyCheck.of(5e-3, full_precision=True).check(gap if gap == gap else 0.0, 4e-3, "a limit of the user's")
