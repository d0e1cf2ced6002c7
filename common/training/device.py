"""Trainer settings that depend on the device, and less output from libraries."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import torch

from common import models
from common.cli import counted, say
from common.processes.heap import keep_freed_memory
from common.settings.grpo import TrainingArgs
from common.settings.sft import SupervisedArgs
from common.training.trainer import compact_fused_head


def quiet_libraries(debug: bool) -> None:
    """Hide messages of libraries on the terminal, unless debugging; this program prints what matters."""
    if debug:
        return
    models.quiet_transformers()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def tune_for_cpu() -> None:
    """Make a training step on a CPU cheaper without changing its result; no effect with a GPU.

    First, TRL's fused head skips prompt and padding positions only where Triton runs; `compact_fused_head` makes it do
    so on a CPU too. Second, the C library keeps the large buffers of each step (`common.processes.heap`). What is free
    between generating and training, and after a step, is given back (`packed_linears`, `ReturnMemory`).
    """
    if torch.cuda.is_available():
        return
    compact_fused_head()
    keep_freed_memory()


def announce_device(args: models.LoraSettings) -> None:
    """Print one line if there is no GPU, with what is used instead."""
    if torch.cuda.is_available():
        return
    kind = "fp32"
    if models.use_4bit(args):
        kind = "NF4 on a CPU, which is slow (--no-4bit is about three times as fast)"
    elif models.cpu_dtype(args) == "bfloat16":
        kind = "matrix products in bf16, which this processor has (--cpu-dtype float32 for fp32)"
    say(f"no GPU found: running on {counted(torch.get_num_threads(), 'CPU thread')}, {kind}")


def device_options(args: TrainingArgs | SupervisedArgs, config: Any) -> dict[str, Any]:
    """Arguments of a transformers trainer that depend on the device, or on the base model's config."""
    gpu = torch.cuda.is_available()
    checkpointing = args.gradient_checkpointing
    return {
        "ddp_find_unused_parameters": None if _may_skip_parameters(config) else False,
        "use_cpu": not gpu,
        "bf16": models.has_native_bf16() if gpu else models.cpu_dtype(args) == "bfloat16",
        "fp16": gpu and not models.has_native_bf16(),
        "activation_checkpointing": gpu if checkpointing is None else checkpointing,
    }


def _may_skip_parameters(config: Any) -> bool:
    """Whether a forward pass may leave out trained parameters: those of experts, or those of a part for images.

    If not, DDP need not search for them, which would cost a pass through the graph in every micro-batch, and a warning.
    """
    text = config.get_text_config()
    return text is not config or any("expert" in name and value for name, value in text.to_dict().items())
