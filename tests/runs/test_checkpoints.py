"""Which checkpoints are complete: of one process and of several, of DeepSpeed and of FSDP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from common.runs.checkpoints import complete_checkpoints, newest_checkpoint
from common.runs.files import write_json
from common.runs.record import TRAINING_CONFIG

ZERO = "global_step7"
# The files that each kind of trainer writes with two processes, besides those that all kinds write.
KINDS = {
    "torchrun": ["optimizer.pt", "scheduler.pt"],
    "DeepSpeed": [
        f"{ZERO}/mp_rank_00_model_states.pt",
        f"{ZERO}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        f"{ZERO}/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "latest",
    ],
    "FSDP": ["optimizer.bin", "scheduler.pt"],
    "FSDP, sharded": ["optimizer_0/.metadata", "scheduler.pt"],
}
EVERY = ["adapter_model.safetensors", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"]


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"a": torch.zeros(9)}, path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        torch.save({"a": torch.zeros(9)}, path)
    else:
        path.write_text({"latest": ZERO, "trainer_state.json": "{}"}.get(path.name, "x"))


def checkpoint(folder: Path, kind: str, step: int = 7) -> Path:
    write_json(folder / TRAINING_CONFIG, {"settings": {"output_dir": "x"}, "processes": 2})
    path = folder / f"checkpoint-{step}"
    for name in [*EVERY, *KINDS[kind]]:
        write(path / name)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_whole_with_all_its_files_and_with_none_of_them_missing_or_cut_off(kind, tmp_path):
    path = checkpoint(tmp_path, kind)
    assert complete_checkpoints(tmp_path) == [path] and newest_checkpoint(tmp_path) == path
    for name in [*EVERY, *KINDS[kind]]:
        whole = (path / name).read_bytes()
        (path / name).unlink()
        assert complete_checkpoints(tmp_path) == [], f"without {name}"
        with pytest.raises(UserError) as caught:
            newest_checkpoint(tmp_path)
        message = str(caught.value)
        assert "checkpoint-7" in message and "missing" in message
        assert "--overwrite" not in message, "advice that would delete what is left of it"
        if name not in ("latest", "optimizer_0/.metadata"):
            (path / name).write_bytes(whole[: len(whole) // 2])
            assert complete_checkpoints(tmp_path) == [], f"half of {name}"
        (path / name).write_bytes(whole)
    assert complete_checkpoints(tmp_path) == [path]


def test_an_older_whole_one_is_taken_where_the_newest_is_not(tmp_path):
    older, newer = checkpoint(tmp_path, "DeepSpeed", 5), checkpoint(tmp_path, "DeepSpeed", 10)
    assert newest_checkpoint(tmp_path) == newer
    (newer / "rng_state_1.pth").unlink()  # this file belongs to the process that was killed first
    assert newest_checkpoint(tmp_path) == older
    record = json.loads((tmp_path / TRAINING_CONFIG).read_text())
    write_json(tmp_path / TRAINING_CONFIG, {**record, "processes": 1})
    assert newest_checkpoint(tmp_path) == newer


def test_nothing_to_resume_from_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path)
