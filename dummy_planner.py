"""Train a planner by imitation (SFT): the baseline that GRPO has to beat, and a warm start for it.

On published planning data, with the constants below:      python dummy_planner.py
JSON plans in the GRPO planner's own prompt (warm start):  python dummy_planner.py --format json-plan \\
    --dataset openai/gsm8k --dataset-config socratic --base-model Qwen/Qwen2.5-0.5B-Instruct --output-dir ./warm_start
then                                                       python grpo_training.py --adapter-path ./warm_start …
On a laptop, in minutes:                                   python dummy_planner.py --demo

Writes to --output-dir: the adapter with its tokenizer, checkpoint-*/, training_config.json, metrics.jsonl (a
line a step, with the evaluation loss where it was taken) and training_curves.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import (
    Parser,
    add_run_flags,
    add_settings,
    check_run_flags,
    forbid_import,
    given_settings,
    run,
    say,
)
from common.errors import UserError
from common.fit.devices import prepare_gpu
from common.fit.missing import check_hub_models
from common.fit.start import check_models
from common.problems.demonstrations import load_demonstrations
from common.problems.planning import load_planning_data
from common.problems.questions import check_source, kind_of_source, kinds_of
from common.processes.engines import check_engine
from common.processes.launcher import check_not_alone
from common.runs.checkpoints import is_last, newest_checkpoint
from common.runs.folder import own_output_dir, settle_replaced
from common.runs.record import TRAINING_CONFIG, check_same_processes, settings_from, stored_settings
from common.settings.partners import SFT_RULES, check_partners
from common.settings.sft import RESUMABLE, SFT_DEMO, SupervisedArgs

BASE_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
DATASET_NAME = "emilbiju/Planning-Data-Math-Full-Soln"
OUTPUT_DIR = "./deepseek-r1-planner-lora"
MAX_SEQ_LEN = 17000
BATCH_SIZE = 2
GRAD_ACCUM = 8
LR = 1e-4
NUM_EPOCHS = 1.0
DEFAULTS: dict[str, Any] = {
    "base_model": BASE_MODEL,
    "dataset": DATASET_NAME,
    "output_dir": OUTPUT_DIR,
    "max_seq_len": MAX_SEQ_LEN,
    "batch_size": BATCH_SIZE,
    "grad_accum": GRAD_ACCUM,
    "lr": LR,
    "num_epochs": NUM_EPOCHS,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line. Defaults are those above and of `SupervisedArgs`."""
    parser = Parser(prog="dummy_planner.py", description=__doc__)
    add_run_flags(parser)
    add_settings(parser, SupervisedArgs, DEFAULTS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, check everything that is quick to check, train and save. Returns the exit code.

    Raises:
        UserError: if a flag, a file or the machine does not allow the run.
    """
    options = build_parser().parse_args(argv)
    check_run_flags(options)
    given = given_settings(options, SupervisedArgs)
    preset = {**DEFAULTS, **(SFT_DEMO if options.demo else {})}
    output_dir = Path({**preset, **given}["output_dir"])
    if options.resume:
        settle_replaced(output_dir)
    values = (
        stored_settings(output_dir, given, RESUMABLE, "dummy_planner.py") if options.resume else {**preset, **given}
    )
    args = SupervisedArgs.from_dict({**DEFAULTS, **values})
    with settings_from(output_dir / TRAINING_CONFIG if options.resume else None, given):
        args.validate()
    if args.format == "json-plan" and args.dataset == DATASET_NAME:
        raise UserError(
            "--format json-plan needs a --dataset: GSM8K's socratic variant, generated:shares or multi:SOURCE (the "
            f"default, {DATASET_NAME}, is planning data)"
        )
    check_partners(args, given, SFT_RULES, kinds_of(args.dataset))
    check_engine()
    check_not_alone()
    prepare_gpu("dummy_planner.py")
    with own_output_dir(output_dir, overwrite=options.overwrite, resume=options.resume, adapter_path=args.adapter_path):
        return start(options, args)


def start(options: argparse.Namespace, args: SupervisedArgs) -> int:
    """Check models and data, then train. Call it with the output folder locked. Returns the exit code."""
    checkpoint = newest_checkpoint(Path(args.output_dir)) if options.resume else None
    if checkpoint is not None:
        check_same_processes(Path(args.output_dir))
        if is_last(checkpoint):
            say(
                f"the run in {args.output_dir} has all of its steps, so nothing is trained: go on from it in another "
                f"--output-dir with --adapter-path {args.output_dir}, here or in grpo_training.py"
            )
    args = check_models(args, given_settings(options, SupervisedArgs))
    if args.format == "json-plan":
        check_source(args.dataset)
    elif kind_of_source(args.dataset) != "hub":
        load_planning_data(args.dataset, None)
    check_hub_models(args)
    plans = load_demonstrations(args) if args.format == "json-plan" else None
    if not args.wandb:
        forbid_import("wandb")
    # torch, transformers and trl are imported here because that takes seconds
    from common.training import device, sft

    device.quiet_libraries(options.debug)
    device.tune_for_cpu()
    return sft.train(args, checkpoint, SupervisedArgs(**DEFAULTS), plans)


if __name__ == "__main__":
    run(main)
