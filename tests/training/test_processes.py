"""Several processes: two real ranks over gloo, as `torchrun` starts them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch
from conftest import ROOT, flags, run_script
from safetensors.torch import load_file

from common.reports.jsonl import read_jsonl

RANKS = 2


def torchrun(*given: str) -> subprocess.CompletedProcess[str]:
    """Run grpo_training.py on two ranks without a GPU."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), "--master_port", "0",
         "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(ROOT / "grpo_training.py"), *given],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_ranks_train_one_adapter_and_resume_in_a_later_epoch_bit_for_bit(tiny_args, tmp_path):
    """Four questions are one step's, so every step is an epoch of its own, each in an order of its own."""
    tiny_args.max_steps, tiny_args.save_steps = 4, 2
    done = torchrun(*flags(tiny_args))
    assert done.returncode == 0, done.stderr[-3000:]
    whole, copy = tmp_path / "run", tmp_path / "copy"
    samples = read_jsonl(whole / "samples.jsonl")
    per_step = tiny_args.batch_size * tiny_args.grad_accum * RANKS
    assert [row["step"] for row in samples] == [step for step in range(1, 5) for _ in range(per_step)]
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoint-4")
    alone = run_script("grpo_training.py", "--output-dir", str(copy), "--resume")
    assert alone.returncode == 2 and "has 2 processes, found 1" in alone.stderr
    done = torchrun("--output-dir", str(copy), "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    keys = ("question", "completion", "reward", "step")
    resumed = [[row[key] for key in keys] for row in read_jsonl(copy / "samples.jsonl")]
    assert resumed == [[row[key] for key in keys] for row in samples]
    expected = load_file(whole / "adapter_model.safetensors")
    found = load_file(copy / "adapter_model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
