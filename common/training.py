"""A GRPO run: model, reward, TRL's trainer, and what is saved when it ends or is stopped."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from trl.trainer import utils as trl_utils
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from common import artifacts, callbacks, models, prompts
from common.args import TrainingArgs
from common.cli import say
from common.data import Question, fingerprint
from common.errors import UserError
from common.pipeline import PipelineExecutor, run_executor
from common.planner_trainer import PlannerTrainer
from common.plots import plot_training_curves
from common.report import append_jsonl, format_table, read_jsonl, truncate_jsonl_after
from common.rewards import PipelineRewardFunction, RewardWeights
from common.scoring import Scoring
from common.serving import server_command, shown_command
from common.similarity import SentenceEncoder
from common.stepclock import StepClock, breakdown_rows
from common.worker import end_token_ids

# A rank whose worker has long answers to write holds the others at the gather; two hours, not ten minutes.
GATHER_TIMEOUT_SECONDS = 7200


def quiet_libraries(debug: bool) -> None:
    """Keep library chatter off the terminal, unless debugging: what matters is said by this program."""
    if debug:
        return
    models.quiet_transformers()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def tune_for_cpu() -> None:
    """Two things that make a training step on a CPU cheaper without changing its result; nothing on a GPU.

    TRL's fused head scores the compacted completion tokens only where Triton runs, and on a CPU every prompt
    and padding position too. And glibc gives the large buffers of each step back to the system and faults
    them in again, page by page; told to keep them, it saves that.
    """
    if torch.cuda.is_available():
        return
    if hasattr(trl_utils, "_use_triton"):
        trl_utils._use_triton = lambda device: True  # read by the fused head alone, to choose compaction
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to tune
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large buffer
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what was freed


def train(
    args: TrainingArgs, questions: list[Question], held_out: list[Question], checkpoint: Path | None = None
) -> int:
    """Run GRPO from the start or from a checkpoint, save the result and keep score on held-out questions.

    Returns:
        0, or 128 + the signal's number when a signal stopped the run (a checkpoint is saved then).

    Raises:
        UserError: for a model that cannot be loaded, memory that runs out, a worker that always fails.
    """
    output_dir = Path(args.output_dir)
    tokenizer = models.load_tokenizer(args.base_model)
    samples = SampleLog(output_dir / "samples.jsonl")
    trainer, executor = build_trainer(args, questions, tokenizer, samples)
    main_process = trainer.accelerator.is_main_process
    if main_process:
        if checkpoint is None:
            artifacts.clear_run(output_dir)  # only now that everything loads is an old run given up
        start_records(args, questions, output_dir, checkpoint)
    wandb_callback = add_wandb(args, trainer, samples) if main_process and args.wandb else None
    scoring = Scoring(args, trainer.accelerator.unwrap_model(trainer.model), tokenizer, executor)
    if held_out and main_process:
        scoring.before(held_out)

    with callbacks.StopOnSignal() as stopper:
        trainer.add_callback(stopper)
        try:
            # A run stopped at its very last step has nothing left to train: the trainer would do one step more.
            if checkpoint is not None and artifacts.checkpoint_step(checkpoint) >= args.max_steps:
                models.load_adapter_weights(trainer.accelerator.unwrap_model(trainer.model), str(checkpoint))
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"the GPU ran out of memory in the training step ({str(error).splitlines()[0]}): lower --batch-size "
                "(raise --grad-accum in turn), --max-completion-length or --worker-batch-tokens, then --resume",
                exit_code=1,
            ) from error
        finally:
            if wandb_callback is not None:
                wandb_callback.close()
    if stopper.received is not None and trainer.state.global_step < args.max_steps:
        return stopped_early("grpo_training.py", stopper.received, trainer.state, output_dir)
    if main_process:
        finish(args, trainer, tokenizer, output_dir)
        if held_out:
            scoring.after(held_out)
    return 0


def stopped_early(script: str, received: int, state: Any, output_dir: Path) -> int:
    """Say how to go on after a signal; returns the exit code."""
    say(
        f"stopped after step {state.global_step} of {state.max_steps}; continue with\n"
        f"  {sys.executable} {script} --output-dir {output_dir} --resume"
    )
    return 128 + received


def announce_device(four_bit: bool) -> None:
    """One line where there is no GPU: what is used instead."""
    if not torch.cuda.is_available():
        kind = "NF4 on a CPU, which is slow (--no-4bit is about three times as fast)" if four_bit else "fp32"
        say(f"no GPU found: running on {torch.get_num_threads()} CPU threads, {kind}")


def device_options(gradient_checkpointing: bool | None) -> dict[str, Any]:
    """The trainer settings that depend on the device."""
    gpu = torch.cuda.is_available()
    return {
        "use_cpu": not gpu,
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "fp16": gpu and not torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": gpu if gradient_checkpointing is None else gradient_checkpointing,
    }


def build_trainer(
    args: TrainingArgs, questions: list[Question], tokenizer: Any, samples: SampleLog | None = None
) -> tuple[GRPOTrainer, PipelineExecutor]:
    """TRL's trainer with the planner's adapter, and the pipeline whose worker is the trainer's own model."""
    check_enough(args, len(questions))
    encoder = SentenceEncoder(args.embedding_model)
    encoder.load()
    four_bit = models.use_4bit(args)
    base = models.load_base(args.base_model, four_bit=four_bit)
    announce_device(four_bit)
    holder: list[GRPOTrainer] = []
    clock = StepClock()
    executor = run_executor(args, lambda: holder[0].accelerator.unwrap_model(holder[0].model), tokenizer, encoder)
    reward = PipelineRewardFunction(
        executor, reward_weights(args), eos_ids=end_token_ids(base, tokenizer), sink=samples, clock=clock
    )
    fold = not prompts.accepts_system(tokenizer)
    trainer = PlannerTrainer(
        clock=clock,
        model=base,
        reward_funcs=[reward],
        args=grpo_config(args),
        train_dataset=Dataset.from_list([planner_row(item, args.planner_style, fold) for item in questions]),
        processing_class=tokenizer,
        peft_config=models.lora_config(args, base),
        callbacks=[
            callbacks.ReportCallback(Path(args.output_dir)),
            callbacks.CollapseWarning(),
            callbacks.ProgressCallback(),
        ],
    )
    holder.append(trainer)
    trainer.remove_callback(transformers.PrinterCallback)
    if args.adapter_path is not None:
        models.load_adapter_weights(trainer.accelerator.unwrap_model(trainer.model), args.adapter_path)
    return trainer, executor


def check_enough(args: TrainingArgs, questions: int) -> None:
    """Stop for fewer questions than one step takes: TRL's sampler would yield nothing and training end at once.

    Raises:
        UserError: with how many are needed.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    needed = args.batch_size * processes * args.grad_accum // args.num_generations
    if questions < needed:
        raise UserError(
            f"--dataset {args.dataset} gives {questions} questions, one step takes {needed} (--batch-size × "
            "processes × --grad-accum / --num-generations): lower --grad-accum or --batch-size, or add questions"
        )


def planner_row(item: Question, style: str, fold_system: bool) -> dict[str, Any]:
    """A row of the data set; question and gold answer travel as columns of their own."""
    messages = prompts.planner_messages(item.question, style)
    prompt = prompts.fold_system(messages) if fold_system else messages
    return {"prompt": prompt, "question": item.question, "answer": item.answer}


def reward_weights(args: TrainingArgs) -> RewardWeights:
    """The formula's weights from the settings."""
    return RewardWeights(
        correctness=args.correctness_weight,
        token=args.token_weight,
        independence=args.independence_weight,
        max_tokens=args.max_tokens,
        format=args.format_weight,
        gate_on_correct=args.gate_on_correct,
    )


def grpo_config(args: TrainingArgs) -> GRPOConfig:
    """TRL's settings from ours."""
    return GRPOConfig(
        output_dir=args.output_dir,
        learning_rate=args.lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(args.lr_schedule, args.lr_schedule),
        warmup_steps=args.warmup_steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        max_steps=args.max_steps,
        num_iterations=args.num_iterations,
        num_generations=args.num_generations,
        temperature=args.temperature,
        top_p=args.top_p,
        max_completion_length=args.max_completion_length,
        beta=args.beta,
        scale_rewards=args.scale_rewards,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        logging_steps=1,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        report_to=[],
        disable_tqdm=True,
        ddp_timeout=GATHER_TIMEOUT_SECONDS,
        **device_options(args.gradient_checkpointing),
    )


class SampleLog:
    """Appends every batch's sample records to `samples.jsonl`, those of all processes from the first one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.listeners: list[Any] = []

    def __call__(self, records: list[dict[str, Any]]) -> None:
        """Write one batch; every process must call it, since the records are gathered."""
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState()
        if state.num_processes > 1:
            records = gather_object(records)
        if not state.is_main_process:
            return
        for record in records:
            append_jsonl(self._path, record)
        for listener in self.listeners:
            listener(records)


def start_records(args: TrainingArgs, questions: list[Question], output_dir: Path, checkpoint: Path | None) -> None:
    """Store the settings; on resume, drop the lines of steps that will be run again."""
    record = artifacts.run_record(
        args.to_dict(),
        script="grpo_training.py",
        seed=args.seed,
        data_fingerprint=fingerprint(questions),
        questions=len(questions),
        four_bit=models.use_4bit(args),
    )
    artifacts.write_json(output_dir / artifacts.TRAINING_CONFIG, record)
    step = 0 if checkpoint is None else artifacts.checkpoint_step(checkpoint)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (output_dir / name).exists():
            truncate_jsonl_after(output_dir / name, step)


def add_wandb(args: Any, trainer: Any, samples: SampleLog | None = None) -> Any:
    """Log to W&B as well; offline where it cannot be reached. None where W&B is switched off."""
    from common import wandb_log  # --no-wandb imports none of it

    started = wandb_log.start_wandb(args.wandb_project, args.wandb_run_name, args.to_dict(), Path(args.output_dir))
    if started is None:
        return None
    callback = wandb_log.WandbCallback()
    trainer.add_callback(callback)
    if samples is not None:
        samples.listeners.append(callback.add_samples)
    return callback


def finish(args: TrainingArgs, trainer: GRPOTrainer, tokenizer: Any, output_dir: Path) -> None:
    """Save adapter and plot, and say what came out and what to do next."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    artifacts.save_adapter(model, tokenizer, output_dir)
    metrics = output_dir / "metrics.jsonl"
    plot_training_curves(metrics, output_dir / "training_curves.png")
    records = read_jsonl(metrics)
    print(summary_table(records))
    if rows := breakdown_rows(records):
        print(f"\n{format_table(rows)}")
    print(f"\nadapter, samples and curves: {output_dir}")
    command = server_command(
        models.resolve_model(args.base_model),
        output_dir,
        cpu=not torch.cuda.is_available(),
        # A base model without a chat template was trained with ours, which vLLM cannot know.
        chat_template=str(output_dir / "chat_template.jinja")
        if tokenizer.chat_template == prompts.PLAIN_CHAT_TEMPLATE
        else None,
    )
    print(f"serve it with vLLM, and ask it with inference_vllm.py:\n  {shown_command(command)}")


SUMMARY = {
    "reward": "reward",
    "correctness": "correct answers",
    "invalid_plan_rate": "invalid plans",
    "decomposition_rate": "plans that split",
    "distinct_plans": "distinct plans",
    "independence": "independence",
    "planner_tokens": "planner tokens",
    "worker_tokens": "worker tokens",
    "step_time": "seconds per step",
}


def summary_table(records: list[dict[str, Any]]) -> str:
    """First against last fifth of the steps, as a table for the terminal."""
    part = max(1, len(records) // 5)
    rows = []
    for key, title in SUMMARY.items():
        row: dict[str, object] = {"": title}
        for name, chosen in (("first steps", records[:part]), ("last steps", records[-part:])):
            values = [record[key] for record in chosen if record.get(key) is not None]
            row[name] = f"{sum(values) / len(values):.3g}" if values else "-"
        rows.append(row)
    return format_table(rows)
