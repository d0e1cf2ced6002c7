"""Train a planner by imitation (SFT): the baseline that GRPO has to beat, and a warm start for it.

On published planning data, with the constants below:      python dummy_planner.py
JSON plans in the GRPO planner's own prompt (warm start):  python dummy_planner.py --format json-plan \\
    --dataset ../shared/data/gsm8k_socratic --base-model Qwen/Qwen2.5-0.5B-Instruct --output-dir ./warm_start
then                                                       python grpo_training.py --adapter-path ./warm_start …
On a laptop, in minutes:                                   python dummy_planner.py --demo

Writes to --output-dir: the adapter with its tokenizer, checkpoint-*/, training_config.json, metrics.jsonl (a
line a step, with the evaluation loss where it was taken) and training_curves.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from common import artifacts
from common.args import DEMO, check_values, setting
from common.cli import Parser, add_run_flags, add_settings, forbid_import, given_settings, run, say, settings_table
from common.data import check_source
from common.errors import UserErrors

BASE_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
DATASET_NAME = "emilbiju/Planning-Data-Math-Full-Soln"
OUTPUT_DIR = "./deepseek-r1-planner-lora"
MAX_SEQ_LEN = 17000
BATCH_SIZE = 2
GRAD_ACCUM = 8
LR = 1e-4
NUM_EPOCHS = 1.0


@dataclass(kw_only=True)
class SupervisedArgs:
    """Settings of the supervised baseline. Lengths are tokens."""

    # fmt: off
    base_model: str = setting(BASE_MODEL, "model", "Hub id or folder of the base model", metavar="MODEL")
    use_4bit: bool | None = setting(None, "model", "NF4 double-quantised base; without either flag: 4-bit on a GPU")
    lora_r: int = setting(16, "model", "LoRA rank", positive=True)
    lora_alpha: int = setting(32, "model", "LoRA scale numerator", positive=True)
    lora_dropout: float = setting(0.0, "model", "LoRA dropout", fraction=True)
    lora_layers: int | None = setting(None, "model", "adapt only the last N layers (default: all)", positive=True)
    adapter_path: str | None = setting(None, "model", "continue from this LoRA adapter", metavar="DIR")

    format: Literal["planning-data", "json-plan"] = setting("planning-data", "data", "columns SystemPrompt, UserPrompt, ExpectedOutput; or JSON plans in the GRPO planner's prompt")
    dataset: str = setting(DATASET_NAME, "data", "Hub id, .jsonl/.parquet file or folder; for json-plan GSM8K's socratic variant or generated:shares")
    dataset_config: str | None = setting(None, "data", "configuration of a Hub data set ('socratic' for openai/gsm8k)", metavar="NAME")
    max_samples: int | None = setting(None, "data", "use at most this many rows (default: all)", positive=True)
    max_seq_len: int = setting(MAX_SEQ_LEN, "data", "longer rows are cut", positive=True)
    planner_style: Literal["full", "short"] = setting("full", "data", "wording of the planner's system message (json-plan)")

    lr: float = setting(LR, "training", "peak learning rate (AdamW, linear decay)", positive=True)
    batch_size: int = setting(BATCH_SIZE, "training", "rows per device and forward/backward pass", positive=True)
    grad_accum: int = setting(GRAD_ACCUM, "training", "passes per optimiser step", positive=True)
    num_epochs: float = setting(NUM_EPOCHS, "training", "passes over the data", positive=True)
    warmup_steps: int = setting(0, "training", "steps of linear warm-up", minimum=0)
    gradient_checkpointing: bool | None = setting(None, "training", "recompute activations to save memory (default: on a GPU only)")
    seed: int = setting(42, "training", "seed of initialisation, data order and demonstrated plans", minimum=0)

    output_dir: str = setting(OUTPUT_DIR, "output", "where everything the run makes is written", metavar="DIR")
    save_steps: int = setting(100, "output", "steps between checkpoints and evaluations", positive=True)
    save_total_limit: int = setting(3, "output", "checkpoints kept", positive=True)
    wandb: bool = setting(True, "output", "log to Weights & Biases (offline when not logged in)")
    wandb_project: str = setting("recursive-reasoner-sft", "output", "W&B project", metavar="NAME")
    wandb_run_name: str | None = setting(None, "output", "W&B run name", metavar="NAME")
    # fmt: on

    def validate(self) -> None:
        """Raise `UserErrors` with every value that is out of range."""
        problems = check_values(self)
        if problems:
            raise UserErrors(problems)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-ready values."""
        return asdict(self)


# The warm start of `make demo`; the questions are of the GRPO demo's family, drawn with another seed.
SFT_DEMO: dict[str, Any] = {
    "base_model": DEMO["base_model"],
    "format": "json-plan",
    "dataset": DEMO["dataset"],
    "planner_style": DEMO["planner_style"],
    "lora_layers": DEMO["lora_layers"],
    "max_samples": 640,
    "max_seq_len": 256,
    "batch_size": 16,
    "grad_accum": 1,
    "lr": 1e-3,
    "seed": 7,
    "output_dir": "./demo_warm_start",
    "wandb": False,
}

RESUMABLE = {"save_steps", "save_total_limit", "output_dir", "wandb", "wandb_project", "wandb_run_name"}


def build_parser() -> argparse.ArgumentParser:
    """All flags; their defaults are those of `SupervisedArgs`."""
    parser = Parser(prog="dummy_planner.py", description=__doc__)
    add_run_flags(parser)
    add_settings(parser, SupervisedArgs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check what is cheap to check, train, save. Returns the exit code."""
    options = build_parser().parse_args(argv)
    given = given_settings(options, SupervisedArgs)
    preset = SFT_DEMO if options.demo else {}
    output_dir = Path({"output_dir": OUTPUT_DIR, **preset, **given}["output_dir"])
    values = (
        artifacts.stored_settings(output_dir, given, RESUMABLE, "dummy_planner.py")
        if options.resume
        else {**preset, **given}
    )
    args = SupervisedArgs(**values)
    args.validate()
    artifacts.check_output_dir(output_dir, overwrite=options.overwrite, resume=options.resume)
    checkpoint = artifacts.newest_checkpoint(output_dir) if options.resume else None
    artifacts.check_base_model(args.base_model)
    if args.adapter_path is not None:
        artifacts.check_adapter_base(args.adapter_path, args.base_model)
    if args.format == "json-plan":
        check_source(args.dataset)
    say(settings_table(args, SupervisedArgs()))

    if not args.wandb:
        forbid_import("wandb")
    from common import supervised, training  # torch, transformers and trl are imported here, and take seconds

    training.quiet_libraries(options.debug)
    training.tune_for_cpu()
    return supervised.train(args, checkpoint)


if __name__ == "__main__":
    run(main)
