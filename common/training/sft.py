"""The supervised baseline (SFT): a planner that imitates plans, trained with TRL's `SFTTrainer`."""

from __future__ import annotations

import math
import random
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from common import models, prompts
from common.cli import counted, say, settings_table
from common.decoding.log_probs import frozen_head, imitated_log_probs, shared_cache
from common.errors import UserError
from common.models.chat_date import fix_date
from common.problems.demonstrations import Plans
from common.problems.planning import load_planning_data
from common.problems.questions import Question, fingerprint, kind_of_source
from common.processes.ranks import world_size
from common.reports.jsonl import read_jsonl
from common.reports.plots import plot_loss_curves
from common.reports.tables import format_table
from common.runs import storage
from common.runs.adapters import save_adapter
from common.runs.record import check_same_data
from common.settings.grpo import DEMO, TrainingArgs
from common.settings.sft import SupervisedArgs
from common.training import callbacks, progress
from common.training.device import announce_device, device_options
from common.training.records import (
    WithoutCard,
    add_to_record,
    add_wandb,
    checkpoint_bytes,
    prompt_date,
    start_records,
)
from common.workers.frozen import FrozenBase
from common.workers.local import end_token_ids

VALIDATION_SHARE = 0.02  # of the training rows, if the source has no split for validation


def train(
    args: SupervisedArgs,
    checkpoint: Path | None,
    defaults: SupervisedArgs,
    plans: Plans | None,
) -> int:
    """Run SFT from the start or from a checkpoint, and save the adapter.

    Args:
        args: settings of the run.
        checkpoint: to resume from, or None.
        defaults: for the table of settings, which marks what differs from them.
        plans: questions and the JSON plans to imitate (`load_demonstrations`); None for published planning data.

    Returns:
        The exit code: 0, or 128 + the number of a signal that stopped the run.

    Raises:
        UserError: if data or a model cannot be loaded.
    """
    given = args
    args = replace(args, cpu_dtype=models.cpu_dtype(args))  # store the dtype that is used, so a resumed run keeps it
    output_dir = Path(args.output_dir)
    tokenizer = models.load_tokenizer(args.base_model)
    training_rows, validation_rows = load_rows(args, plans)
    prompts.check_shown(tokenizer, [training_rows[0].prompt])
    day = prompt_date(args, checkpoint)
    dated = fix_date(tokenizer, day)
    found = fingerprint_rows(training_rows)
    if checkpoint is not None:
        check_same_data(output_dir, found)
    say(settings_table(given, defaults))  # only now, so that no error about the data comes below it
    four_bit = models.use_4bit(args)
    base = models.load_base(args.base_model, four_bit=four_bit, cpu_dtype=models.cpu_dtype(args))
    announce_device(args)
    frozen = FrozenBase(base, tokenizer)
    end_ids = end_token_ids(base, tokenizer)
    training, validation = (tokenised(tokenizer, rows, end_ids) for rows in (training_rows, validation_rows))
    check_length(args.max_seq_len, training, validation)
    tell_warmup(args, len(training))
    if longer := sum(len(ids) > args.max_seq_len for ids in training["input_ids"]):
        say(
            f"{longer} of {counted(len(training), 'row')}: longer than --max-seq-len {args.max_seq_len}, cut at the end"
        )
    trainer = build_trainer(args, base, tokenizer, training, validation)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.adapter_path is not None:
        models.load_adapter_weights(model, args.adapter_path)
    models.train_in_fp32(model)
    frozen.measure(model, step=0, adapter_path=args.adapter_path)
    say(f"{counted(len(training_rows), 'row')} to imitate, {len(validation_rows)} to validate on")
    facts = {
        "data_fingerprint": found,
        "rows": len(training_rows),
        "data_source": kind_of_source(args.dataset),
        "prompt_date": day.isoformat() if dated else None,
    }
    with storage.explained(
        output_dir, lambda: storage.how_to_resume("dummy_planner.py", output_dir), lambda: checkpoint_bytes(trainer)
    ):
        return _run(args, checkpoint, trainer, tokenizer, frozen, facts)


def _run(
    args: SupervisedArgs,
    checkpoint: Path | None,
    trainer: SFTTrainer,
    tokenizer: Any,
    frozen: FrozenBase,
    facts: dict[str, Any],
) -> int:
    """Train, save, and say what the result is; see `train`. `facts` are further entries of `training_config.json`."""
    output_dir, four_bit = Path(args.output_dir), models.use_4bit(args)
    model = trainer.accelerator.unwrap_model(trainer.model)
    main_process = trainer.accelerator.is_main_process
    if main_process:
        start_records(
            args,
            checkpoint,
            script="dummy_planner.py",
            **facts,
            four_bit=four_bit,
            quantised_on=models.quantised_on(model) if four_bit else None,
            dtype=str(model.get_base_model().dtype),
            frozen_worker=frozen.record(),
        )
    wandb_callback = add_wandb(args, trainer, resumes=checkpoint is not None) if main_process and args.wandb else None
    try:
        with callbacks.StopOnSignal() as stopper:
            trainer.add_callback(stopper)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stopper.received is not None:
            return callbacks.stopped_early("dummy_planner.py", stopper.received, trainer.state, output_dir)
        # The trainer evaluates after its last step, but not if the run was resumed at that step.
        done = [record for record in trainer.state.log_history if "eval_loss" in record]
        final = done[-1] if done and done[-1]["step"] == trainer.state.global_step else trainer.evaluate()
    finally:
        if wandb_callback is not None:
            wandb_callback.close()
    frozen.measure(model, step=trainer.state.global_step, adapter_path=args.adapter_path)
    if main_process:
        add_to_record(output_dir, frozen_worker=frozen.record())
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
        print(f"go on with GRPO:\n  {sys.executable} grpo_training.py {shlex.join(grpo_flags(args))}")
    return 0


def grpo_flags(args: SupervisedArgs) -> list[str]:
    """The flags with which GRPO goes on from the adapter of a run: the same base, questions and planner prompt."""
    told = {"base_model": args.base_model, **args.planner_prompt()}
    if args.format == "json-plan":
        told["dataset"] = args.dataset
    demo = all(value == DEMO.get(name, getattr(TrainingArgs, name)) for name, value in told.items())
    flags = ["--demo"] if demo else []
    for name, value in told.items():
        if not demo and (name in ("base_model", "dataset") or value != getattr(TrainingArgs, name)):
            flags += [f"--{name.replace('_', '-')}", value]
    return [*flags, "--adapter-path", args.output_dir]


def sft_config(args: SupervisedArgs, base: Any) -> SFTConfig:
    """The settings of TRL's trainer for a run; `base` is the base model's config.

    The rows contain labels, so the loss is on the completion only.
    """
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
        seed=args.seed,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=args.save_steps,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        report_to=[],
        disable_tqdm=True,
        **device_options(args, base),
    )


class ImitationTrainer(WithoutCard, SFTTrainer):
    """`SFTTrainer`; it writes no model card, and on a CPU it runs what all prompts of a batch begin with once."""

    def compute_loss(self, model: Any, inputs: Any, *others: Any, **options: Any) -> Any:
        """TRL's loss. On a CPU, `imitated_log_probs` takes the place of TRL's pass through the model."""
        base = self.accelerator.unwrap_model(self.model).get_base_model()
        cache, head = shared_cache(self), frozen_head(base)
        if cache is None or head is None:
            return super().compute_loss(model, inputs, *others, **options)

        def scored(*, input_ids: Any, attention_mask: Any, labels: Any, **ignored: Any) -> FusedCausalLMOutput:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            rows = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            with self.accelerator.autocast():
                log_probs, entropy, is_top1 = imitated_log_probs(base.base_model, head, dtype, cache, **rows)
            return FusedCausalLMOutput(
                log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=labels[:, 1:] != -100
            )

        return super().compute_loss(scored, inputs, *others, **options)


def build_trainer(
    args: SupervisedArgs, base: Any, tokenizer: Any, training: Dataset, validation: Dataset
) -> ImitationTrainer:
    """TRL's trainer with the adapter of a run on its base model. The rows are those of `tokenised`."""
    output_dir = Path(args.output_dir)
    trainer = ImitationTrainer(
        model=base,
        args=sft_config(args, base.config),
        train_dataset=training,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=models.lora_config(args, base),
        callbacks=[
            callbacks.ReportCallback(output_dir, plot=plot_loss_curves),
            callbacks.FollowSettings(),
            callbacks.ReturnMemory(),
            callbacks.DropReplacedRun(output_dir),
            progress.ProgressCallback(),
        ],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt, and the completion to imitate."""

    prompt: list[prompts.Message]
    completion: str


def load_rows(args: SupervisedArgs, plans: Plans | None) -> tuple[list[Demonstration], list[Demonstration]]:
    """The demonstrations to imitate, and those to validate on.

    Raises:
        UserError: if planning data cannot be read, or there are too few rows.
    """
    if plans is not None:
        rows = [
            Demonstration(
                prompts.planner_messages(item.question, args.planner_style, args.worker_context), plan.to_json()
            )
            for item, plan in plans
        ]
        return _cut(rows, args.dataset, args.seed)
    training, held_out = (
        [
            Demonstration([{"role": "system", "content": system}, {"role": "user", "content": user}], expected)
            for system, user, expected in part
        ]
        for part in load_planning_data(args.dataset, args.dataset_config)
    )
    training = training[: args.max_samples]
    return (training, held_out) if held_out else _cut(training, args.dataset, args.seed)


def tokenised(tokenizer: Any, rows: list[Demonstration], end_ids: frozenset[int]) -> Dataset:
    """Rows as token ids: the prompt as in GRPO and on a server, the completion unchanged, an end-of-sequence token.

    TRL could render whole conversations instead. But the chat templates of reasoning models remove the reasoning from
    an answer and begin it in the prompt. So the model would be trained on prompts and answers that differ from those in
    GRPO and on a server.

    Args:
        tokenizer: of the model.
        rows: demonstrations.
        end_ids: ids of the tokens that end a completion.
    """
    end = _turn_end(tokenizer, end_ids)
    texts = prompts.render_all(tokenizer, [row.prompt for row in rows])
    asked = tokenizer(texts, add_special_tokens=False)["input_ids"]
    told = tokenizer([row.completion for row in rows], add_special_tokens=False)["input_ids"]
    return Dataset.from_list(
        [
            {"input_ids": [*prompt, *answer, end], "labels": [-100] * len(prompt) + [*answer, end]}
            for prompt, answer in zip(asked, told, strict=True)
        ]
    )


def check_length(limit: int, training: Dataset, validation: Dataset) -> None:
    """Refuse a length limit that cuts every completion away, of the rows to imitate or of those to validate on.

    Raises:
        UserError: with the limit from which something is left, and the one that cuts nothing.
    """
    for rows in (training, validation):
        begins = [next(place for place, label in enumerate(labels) if label != -100) for labels in rows["labels"]]
        if limit <= min(begins):
            longest = max(map(len, [*training["input_ids"], *validation["input_ids"]]))
            raise UserError(
                f"--max-seq-len {limit} leaves no token to imitate, because the shortest prompt has {min(begins)}: "
                f"give more ({longest} cuts nothing)"
            )


def tell_warmup(args: SupervisedArgs, rows: int) -> None:
    """Tell of a warm-up that the run, with so many rows to imitate, would not leave."""
    passes = math.ceil(math.ceil(rows / world_size()) / args.batch_size)
    progress.tell_whole_warmup(args.warmup_steps, math.ceil(args.num_epochs * math.ceil(passes / args.grad_accum)))


def _turn_end(tokenizer: Any, end_ids: frozenset[int]) -> int:
    """The token that the chat template writes after an answer, if it ends generation; else the tokenizer's own."""
    turn = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "omega"}]
    shown = tokenizer.apply_chat_template(turn, tokenize=False)
    behind = tokenizer(shown.rpartition("omega")[2], add_special_tokens=False)["input_ids"]
    return behind[0] if behind and behind[0] in end_ids else tokenizer.eos_token_id


def fingerprint_rows(rows: list[Demonstration]) -> str:
    """Like `common.problems.questions.fingerprint`, for prompts and completions."""
    return fingerprint(Question(row.prompt[-1]["content"], row.completion) for row in rows)


def _cut(rows: list[Demonstration], source: str, seed: int) -> tuple[list[Demonstration], list[Demonstration]]:
    """Split off the validation rows at random; the same seed gives the same rows."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = max(1, round(VALIDATION_SHARE * len(rows)))
    chosen = set(order[:count])
    training = [row for number, row in enumerate(rows) if number not in chosen]
    if not training:
        raise UserError(
            f"--dataset {source} gives {counted(len(rows), 'row')} to imitate: at least two are needed, one of them to "
            "validate on: add rows, or raise --max-samples"
        )
    return training, [rows[number] for number in sorted(chosen)]
