"""A training step and 4-bit inference at full size on one GPU: time of its parts, and peak memory.

    python -m tests.benchmarks.gpu_step --output gpu_step.md          # Llama-3.1-8B's shape; 16 GB of disk
    python -m tests.benchmarks.gpu_step --tiny                        # the same code on any machine, in a minute

Random weights of the documented default's shape stand in for the real ones, which time and memory do not depend
on; the settings are `TrainingArgs`' defaults (4-bit, LoRA r 16, batch 1, accumulation 8, G 4, 512 completion tokens).
Random weights never write an end token or a valid plan: every completion is as long as it may be, the worst case,
and the worker is made to solve every question directly.

Writes the model to --model-dir (kept, and used again) and the tables to --output.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.cli import Parser, count, run
from common.errors import UserError
from common.problems.questions import Question
from common.reports.jsonl import read_jsonl
from common.reports.step_clock import breakdown_rows
from common.reports.tables import format_table
from common.settings.grpo import PACKAGED_MODEL, TrainingArgs
from tests.benchmarks import mix

# https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct/blob/main/config.json
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TINY: dict[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(prog="gpu_step", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and short completions, on any machine")
    parser.add_argument("--steps", type=count, default=3, metavar="N", help="training steps (default: 3)")
    parser.add_argument(
        "--model-dir", type=Path, metavar="DIR", help="where the model lies or goes (default: temporary)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model, train, generate, and report. Returns the exit code.

    Raises:
        UserError: if the machine has no GPU (except with --tiny).
    """
    options = build_parser().parse_args(argv)
    import torch

    if not options.tiny and not torch.cuda.is_available():
        raise UserError(
            "no GPU found, and this measures one: run it where torch sees CUDA, or try the code with --tiny"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model_dir or Path(scratch) / "random-model"
        if not (folder / "config.json").exists():
            write_random_model(folder, TINY if options.tiny else LLAMA_8B)
        steps, training_peak = training(folder, options.steps, tiny=options.tiny)
        tokens, seconds, inference_peak = inference(folder, tiny=options.tiny)
    text = (
        f"{datetime.now(UTC):%Y-%m-%d}, {device}, torch {torch.__version__}, {options.steps} steps\n\n"
        f"{steps}\n\npeak GPU memory: training {training_peak:.1f} GiB, 4-bit inference {inference_peak:.1f} GiB\n"
        f"4-bit worker on the 24-completion mix: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s\n"
    )
    print(text)
    if options.output is not None:
        options.output.write_text(text)
    return 0


def write_random_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write a Llama of this shape with random bf16 weights, and a tokenizer with ids below its vocabulary size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.models import load_tokenizer

    tokenizer = load_tokenizer(PACKAGED_MODEL)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape, **ends), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    reset_peak()


def training(folder: Path, steps: int, *, tiny: bool) -> tuple[str, float]:
    """Run a few GRPO steps with default settings. Returns the table of a step's parts, and peak GPU memory in GiB."""
    from common import models
    from common.training import device, grpo

    device.quiet_libraries(debug=False)
    short: dict[str, Any] = {"max_completion_length": 16, "worker_max_tokens": 16} if tiny else {}
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArgs(base_model=str(folder), output_dir=output, max_steps=steps, wandb=False, **short)
        questions = [Question(group[0].question, group[0].ground_truth or "") for group in mix.load_groups()]
        trainer, executor = grpo.build_trainer(args, questions, models.load_tokenizer(args.base_model))
        reward: Any = trainer.reward_funcs[0]
        reward.executor = executor.with_fallback()
        trainer.train()
        # The first step also compiles kernels and reserves memory, so it is left out.
        records = read_jsonl(Path(output) / "metrics.jsonl")
    return format_table(breakdown_rows(records[1:] or records)), peak_gib()


def inference(folder: Path, *, tiny: bool) -> tuple[int, float, float]:
    """Run the worker on the mix, 4-bit on a GPU. Returns tokens generated, seconds, and peak GPU memory in GiB."""
    import torch

    from common import models
    from common.pipeline import PipelineExecutor
    from common.similarity import Embeddings, SentenceEncoder
    from common.workers.local import FrozenWorker

    reset_peak()
    model = models.load_base(str(folder), four_bit=torch.cuda.is_available()).eval()
    tokenizer = models.load_tokenizer(str(folder))
    worker = FrozenWorker(model, tokenizer, max_tokens=16 if tiny else TrainingArgs.worker_max_tokens)
    embeddings = Embeddings(SentenceEncoder(TrainingArgs.embedding_model))
    PipelineExecutor(worker, embeddings).execute_batch(mix.grpo_mix(24))
    stats = worker.take_stats()
    return stats.generated_tokens, stats.seconds, peak_gib()


def reset_peak() -> None:
    """Free memory of earlier parts and restart the measurement of the peak."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Peak GPU memory that torch has held since `reset_peak`, in GiB; 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    run(main)
