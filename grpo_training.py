"""Train a planner with GRPO: a LoRA adapter that writes plans, rewarded by what a frozen worker makes of them.

The planner (adapter on) answers each question with a JSON plan; the worker (the same weights, adapter off)
solves its subproblems and combines them, or solves directly; the reward is

    correctness_weight × correct + token_weight × (1 − tokens / max_tokens) + independence_weight × independence

See it work, on a laptop:       python grpo_training.py --demo
Train on GSM8K, on one GPU:     python grpo_training.py --base-model meta-llama/Llama-3.1-8B-Instruct
Several GPUs:                   accelerate launch grpo_training.py …
Will it fit?                    python grpo_training.py --base-model … --check
Continue after a stop:          python grpo_training.py --output-dir DIR --resume

Writes to --output-dir: the adapter with its tokenizer, checkpoint-*/, training_config.json, metrics.jsonl (a
line a step), samples.jsonl (a line a completion) and training_curves.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.cli import (
    Parser,
    add_run_flags,
    add_settings,
    check_run_flags,
    counted,
    forbid_import,
    given_settings,
    run,
    say,
    settings_table,
)
from common.errors import UserError
from common.fit.devices import prepare_gpu
from common.fit.missing import check_hub_models
from common.fit.start import check_models
from common.pipeline import PipelineExecutor, PipelineResult
from common.problems.questions import check_enough, check_source, fingerprint, kinds_of, load_held_out, load_questions
from common.processes.engines import check_engine
from common.processes.launcher import check_not_alone
from common.rewards import PipelineRewardFunction
from common.runs.adapters import read_adapter_config
from common.runs.checkpoints import checkpoint_step, newest_checkpoint
from common.runs.folder import own_output_dir, settle_replaced
from common.runs.record import (
    TRAINING_CONFIG,
    check_same_data,
    check_same_processes,
    read_run_record,
    settings_from,
    stored_settings,
)
from common.servers.vllm import serve_base
from common.settings.grpo import DEMO, RESUMABLE, TrainingArgs
from common.settings.partners import GRPO_RULES, check_partners
from common.workers.local import FrozenWorker

__all__ = [
    "FrozenWorker",
    "PipelineExecutor",
    "PipelineResult",
    "PipelineRewardFunction",
    "TrainingArgs",
    "main",
]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line. Defaults are those of `TrainingArgs`."""
    parser = Parser(prog="grpo_training.py", description=__doc__)
    run_flags = add_run_flags(parser)
    run_flags.add_argument(
        "--eval-only", action="store_true", help="only make the scoreboard of the trained run in --output-dir"
    )
    run_flags.add_argument(
        "--check", action="store_true", help="only say whether the run would fit and what is missing; loads no weights"
    )
    add_settings(parser, TrainingArgs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, check everything that is quick to check, train and save. Returns the exit code.

    Raises:
        UserError: if a flag, a file or the machine does not allow the run.
    """
    options = build_parser().parse_args(argv)
    check_run_flags(options)
    if options.check and options.eval_only:
        raise UserError("--check looks at a training run: leave out --eval-only")
    if options.resume and options.eval_only:
        raise UserError("--resume trains the run further and --eval-only scores it as it is: leave one of them out")
    args, given = settle(options), given_settings(options, TrainingArgs)
    goes_on = options.resume or options.eval_only
    with settings_from(Path(args.output_dir, TRAINING_CONFIG) if goes_on else None, given):
        args.validate()
    check_partners(args, given, GRPO_RULES, kinds_of(args.dataset, args.eval_dataset))
    check_engine()
    check_not_alone()
    prepare_gpu("grpo_training.py")
    if options.check:
        from common.fit.check import check_run

        return check_run(args, given, overwrite=options.overwrite, resume=options.resume)
    output_dir = Path(args.output_dir)
    with own_output_dir(output_dir, overwrite=options.overwrite, resume=goes_on, adapter_path=args.adapter_path):
        return start(options, args)


def start(options: argparse.Namespace, args: TrainingArgs) -> int:
    """Check models and data, then train or evaluate. Call it with the output folder locked. Returns the exit code."""
    output_dir = Path(args.output_dir)
    checkpoint = newest_checkpoint(output_dir) if options.resume else None
    if checkpoint is not None:
        check_same_processes(output_dir)
        done = checkpoint_step(checkpoint)
        if done > args.max_steps:
            raise UserError(
                f"--max-steps {args.max_steps}: the run in {output_dir} has done {done}: give more than that"
            )
        if done == args.max_steps:
            say(
                f"the run in {output_dir} has all of its {counted(args.max_steps, 'step')}, so nothing is trained: "
                "give more with --max-steps, or make its scoreboard with --eval-only"
            )
    args = check_models(args, given_settings(options, TrainingArgs))
    if options.eval_only:
        read_adapter_config(args.output_dir, "--output-dir")
    check_source(args.dataset, args.dataset_split)
    if args.eval_dataset is not None:
        check_source(args.eval_dataset, "test", flag="--eval-dataset")
    check_hub_models(args)
    questions = load_questions(
        args.dataset, limit=args.max_samples, config=args.dataset_config, split=args.dataset_split, seed=args.seed
    )
    if options.resume or options.eval_only:
        check_same_data(output_dir, fingerprint(questions))
    else:
        check_enough(args, len(questions))
    held_out = load_held_out(args, questions) if args.eval_samples else []

    if not args.wandb:
        forbid_import("wandb")
    with serve_base(args) as args:
        if args.worker_url is not None or args.vllm_url is not None:
            from common.workers.remote import check_worker

            check_worker(args)
        say(settings_table(args, TrainingArgs()))
        # torch, transformers and trl are imported here because that takes seconds
        from common.evaluation import during_training
        from common.training import device, grpo

        device.quiet_libraries(options.debug)
        device.tune_for_cpu()
        if options.eval_only:
            return during_training.evaluate_run(args, held_out, anew=options.overwrite)
        return grpo.train(args, questions, held_out, checkpoint)


def settle(options: argparse.Namespace) -> TrainingArgs:
    """The settings of the run. Later ones win: defaults, the demo preset or the resumed run, explicit flags.

    Raises:
        UserError: for a flag that would change what a resumed run is.
    """
    given = given_settings(options, TrainingArgs)
    if not options.resume and not options.eval_only:
        return TrainingArgs(**{**(DEMO if options.demo else {}), **given})
    default_dir = DEMO["output_dir"] if options.demo else TrainingArgs.output_dir
    output_dir = Path(given.get("output_dir", default_dir))
    settle_replaced(output_dir)
    args = TrainingArgs.from_dict(stored_settings(output_dir, given, RESUMABLE, "grpo_training.py"))
    if options.eval_only:
        args.vllm_url = args.vllm_python = None  # for evaluation the worker is the local base model
        if "vllm_url" in given or "vllm_python" in given:
            raise UserError("--eval-only needs no vLLM server: leave --vllm-url and --vllm-python out")
    elif "vllm_url" in given:
        args.vllm_python = None
    elif args.vllm_python is not None:
        args.vllm_url = None  # the address of a server that the earlier run started and stopped
    stored = read_run_record(output_dir)["settings"]
    if args.samples_from_servers() and not (stored.get("vllm_url") or stored.get("vllm_python")):
        raise UserError(f"--vllm-url: the run in {output_dir} samples its plans itself: leave the flag out")
    # The server's address may have changed, but with or without a server the worker is another model.
    if args.worker_url is not None and stored.get("worker_url") is None:
        raise UserError(f"--worker-url: the worker of the run in {output_dir} is no server's: leave the flag out")
    if options.eval_only and not args.eval_samples:
        raise UserError("--eval-only needs to know how many questions: for example --eval-samples 200")
    return args


if __name__ == "__main__":
    run(main)
