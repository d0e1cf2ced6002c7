"""The supervised baseline: a planner that imitates plans, with TRL's `SFTTrainer`."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, DatasetDict, load_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from common import models, prompts
from common.cli import say
from common.errors import UserError
from common.problems.demonstrations import demonstrations
from common.problems.questions import fingerprint, load_questions
from common.reports.jsonl import read_jsonl
from common.reports.plots import plot_loss_curves
from common.reports.tables import format_table
from common.runs.adapters import save_adapter
from common.runs.record import check_same_data
from common.settings.grpo import PACKAGED_MODEL
from common.settings.sft import SupervisedArgs
from common.training import callbacks, progress
from common.training.device import announce_device, device_options
from common.training.records import add_wandb, start_records

COLUMNS = ("SystemPrompt", "UserPrompt", "ExpectedOutput")
VALIDATION_SHARE = 0.02  # cut off the training rows where a source has no split to validate on


def train(args: SupervisedArgs, checkpoint: Path | None = None) -> int:
    """Run SFT from the start or from a checkpoint, and save the adapter.

    Returns:
        0, or 128 + the signal's number when a signal stopped the run.

    Raises:
        UserError: for data or a model that cannot be loaded.
    """
    output_dir = Path(args.output_dir)
    tokenizer = models.load_tokenizer(args.base_model)
    training_rows, validation_rows = load_rows(args, fold=not prompts.accepts_system(tokenizer))
    found = fingerprint_rows(training_rows)
    if checkpoint is not None:
        check_same_data(output_dir, found)
    four_bit = models.use_4bit(args)
    base = models.load_base(args.base_model, four_bit=four_bit)
    announce_device(four_bit)
    trainer = SFTTrainer(
        model=base,
        args=sft_config(args),
        train_dataset=Dataset.from_list(training_rows),
        eval_dataset=Dataset.from_list(validation_rows),
        processing_class=tokenizer,
        peft_config=models.lora_config(args, base),
        callbacks=[
            callbacks.ReportCallback(output_dir, plot=plot_loss_curves),
            progress.ProgressCallback(),
        ],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.adapter_path is not None:
        models.load_adapter_weights(model, args.adapter_path)
    models.train_in_fp32(model)
    if trainer.accelerator.is_main_process:
        start_records(
            args,
            checkpoint,
            script="dummy_planner.py",
            data_fingerprint=found,
            rows=len(training_rows),
            four_bit=four_bit,
        )
        if args.wandb:
            add_wandb(args, trainer)
    say(f"{len(training_rows)} rows to imitate, {len(validation_rows)} to validate on")

    with callbacks.StopOnSignal() as stopper:
        trainer.add_callback(stopper)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stopper.received is not None:
        return callbacks.stopped_early("dummy_planner.py", stopper.received, trainer.state, output_dir)
    # The trainer evaluates after its last step, but not where it was resumed there.
    done = [record for record in trainer.state.log_history if "eval_loss" in record]
    final = done[-1] if done and done[-1]["step"] == trainer.state.global_step else trainer.evaluate()
    if trainer.accelerator.is_main_process:
        save_adapter(model, tokenizer, output_dir)
        plot_loss_curves(output_dir / "metrics.jsonl", output_dir / "training_curves.png")
        losses = [
            record["loss"] for record in read_jsonl(output_dir / "metrics.jsonl") if record.get("loss") is not None
        ]
        print(
            format_table(
                [
                    {"": "first training loss", "value": f"{losses[0]:.3f}"},
                    {"": "last training loss", "value": f"{losses[-1]:.3f}"},
                    {"": "validation loss", "value": f"{final['eval_loss']:.3f}"},
                ]
            )
        )
        print(f"\nadapter and curves: {output_dir}")
        preset = "--demo" if args.base_model == PACKAGED_MODEL else f"--base-model {args.base_model}"
        print(f"go on with GRPO:\n  {sys.executable} grpo_training.py {preset} --adapter-path {output_dir}")
    return 0


def sft_config(args: SupervisedArgs) -> SFTConfig:
    """TRL's settings from ours; the loss is taken on the completion only."""
    return SFTConfig(
        output_dir=args.output_dir,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        warmup_steps=args.warmup_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        num_train_epochs=args.num_epochs,
        max_length=args.max_seq_len,
        completion_only_loss=True,
        seed=args.seed,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=args.save_steps,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        report_to=[],
        disable_tqdm=True,
        **device_options(args.gradient_checkpointing),
    )


def load_rows(args: SupervisedArgs, *, fold: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation rows, each a prompt and a completion as chat messages."""
    if args.format == "json-plan":
        questions = load_questions(
            args.dataset,
            limit=args.max_samples or 1_000_000
            if not args.dataset.startswith("generated:")
            else args.max_samples or 1000,
            config=args.dataset_config,
            seed=args.seed,
        )
        rows = [
            _row(prompts.planner_messages(item.question, args.planner_style), plan.to_json(), fold)
            for item, plan in demonstrations(questions, args.seed)
        ]
        if not rows:
            raise UserError(
                f"--dataset {args.dataset} has nothing to imitate: json-plan needs GSM8K's socratic variant "
                "(solution lines 'sub-question ** step') or generated:shares"
            )
        return _cut(rows, args.seed)
    table = _planning_data(args.dataset, args.dataset_config)
    splits = {name: [_planning_row(row, fold, args.dataset) for row in part] for name, part in table.items()}
    training = splits.get("train") or next(iter(splits.values()))
    training = training[: args.max_samples]
    held_out = splits.get("validation") or splits.get("test")
    return (training, held_out) if held_out else _cut(training, args.seed)


def fingerprint_rows(rows: list[dict[str, Any]]) -> str:
    """As `common.problems.questions.fingerprint`, of prompts and completions."""
    from common.problems.questions import Question

    return fingerprint(Question(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in rows)


def _row(messages: list[prompts.Message], completion: str, fold: bool) -> dict[str, Any]:
    prompt = prompts.fold_system(messages) if fold else messages
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}


def _planning_row(row: dict[str, Any], fold: bool, source: str) -> dict[str, Any]:
    missing = [name for name in COLUMNS if not isinstance(row.get(name), str)]
    if missing:
        raise UserError(
            f"--dataset {source}: no text in column {missing[0]} (columns found: {', '.join(row)}): "
            f"{', '.join(COLUMNS)} are expected; for questions with answers use --format json-plan"
        )
    system, user, expected = (row[name] for name in COLUMNS)
    return _row([{"role": "system", "content": system}, {"role": "user", "content": user}], expected, fold)


def _planning_data(source: str, config: str | None) -> DatasetDict:
    """All splits of a planning data set, from the Hub or from a local file or folder."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            files = {
                child.stem: str(child) for child in sorted(path.iterdir()) if child.suffix in (".jsonl", ".parquet")
            }
            kind = "parquet" if any(name.endswith(".parquet") for name in files.values()) else "json"
            return load_dataset(kind, data_files=files)
        if path.is_file():
            return load_dataset("parquet" if path.suffix == ".parquet" else "json", data_files={"train": str(path)})
        return load_dataset(source, config)
    except Exception as error:
        first = str(error).strip().splitlines()
        raise UserError(
            f"data set {source!r} could not be loaded ({type(error).__name__}: {first[0] if first else ''}): check its "
            "name and the network, or pass a local .jsonl or .parquet file with --dataset",
            exit_code=1,
        ) from error


def _cut(rows: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cut the validation rows off, at random but the same for the same seed."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = max(1, round(VALIDATION_SHARE * len(rows)))
    chosen = set(order[:count])
    training = [row for number, row in enumerate(rows) if number not in chosen]
    if not training:
        raise UserError(f"one row is too few: a validation row has to be cut off it ({len(rows)} found)")
    return training, [rows[number] for number in sorted(chosen)]
