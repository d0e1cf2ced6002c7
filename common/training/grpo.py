"""A GRPO run (arXiv:2402.03300): build the model, the reward and TRL's trainer; train; save the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from common import models, prompts
from common.errors import UserError
from common.evaluation.during_training import Scoring, how_to_continue
from common.fit.step import context_of, longest_planner_prompt
from common.models.chat_date import fix_date
from common.pipeline import PipelineExecutor, run_executor
from common.problems.questions import Question, check_enough, fingerprint, kind_of_source
from common.processes.ranks import PATIENCE_SECONDS
from common.processes.signals import stoppable
from common.reports.jsonl import read_jsonl
from common.reports.metrics import summary_table
from common.reports.plots import plot_training_curves
from common.reports.step_clock import StepClock, breakdown_rows
from common.reports.tables import format_table
from common.rewards import PipelineRewardFunction, RewardWeights
from common.runs import storage
from common.runs.adapters import save_adapter
from common.runs.checkpoints import answers_file, checkpoint_step
from common.servers.vllm import server_command, shown_command
from common.settings.grpo import TrainingArgs, check_plan_fits
from common.similarity import SentenceEncoder
from common.training import callbacks, progress, records
from common.training.device import announce_device, device_options
from common.training.records import SampleLog
from common.training.trainer import PlannerTrainer
from common.workers.frozen import FrozenBase
from common.workers.local import FrozenWorker, end_token_ids
from common.workers.remote import ServerWorker
from common.workers.rollouts import PolicyCheck, ServedPlanner


def train(
    args: TrainingArgs, questions: list[Question], held_out: list[Question], checkpoint: Path | None = None
) -> int:
    """Run GRPO from the start or from a checkpoint, save the result, and make the scoreboard.

    Args:
        args: settings of the run.
        questions: to train on.
        held_out: questions of the scoreboard; [] for no scoreboard.
        checkpoint: to resume from, or None.

    Returns:
        The exit code: 0, or 128 + the number of a signal that stopped the run after a checkpoint.

    Raises:
        UserError: if a model cannot be loaded, memory runs out, or the worker always fails.
    """
    args = replace(args, cpu_dtype=models.cpu_dtype(args))  # store the dtype that is used, so a resumed run keeps it
    output_dir = Path(args.output_dir)
    tokenizer = models.load_tokenizer(args.base_model)
    prompts.check_shown(
        tokenizer,
        prompts.sample_requests(
            args.planner_style, None if args.worker_url else args.worker_style, args.worker_context
        ),
    )
    day = records.prompt_date(args, checkpoint)
    dated = fix_date(tokenizer, day)
    samples = SampleLog(output_dir / "samples.jsonl")
    trainer, executor = build_trainer(args, questions, tokenizer, samples)
    facts = {
        "data_fingerprint": fingerprint(questions),
        "data_source": kind_of_source(args.dataset),
        "questions": len(questions),
        "prompt_date": day.isoformat() if dated else None,
    }
    script = "grpo_training.py"
    with storage.explained(
        output_dir, lambda: storage.how_to_resume(script, output_dir), lambda: records.checkpoint_bytes(trainer)
    ):
        return _run(args, held_out, checkpoint, trainer, executor, tokenizer, samples, facts)


def _run(
    args: TrainingArgs,
    held_out: list[Question],
    checkpoint: Path | None,
    trainer: PlannerTrainer,
    executor: PipelineExecutor,
    tokenizer: Any,
    samples: SampleLog,
    facts: dict[str, Any],
) -> int:
    """The scoreboard before training, training, saving, and the scoreboard after training; see `train`.

    `facts` are additional entries of `training_config.json`.
    """
    output_dir = Path(args.output_dir)
    main_process = trainer.accelerator.is_main_process
    model = trainer.accelerator.unwrap_model(trainer.model)
    if main_process:
        records.start_records(
            args,
            checkpoint,
            script="grpo_training.py",
            **facts,
            four_bit=models.use_4bit(args),
            quantised_on=models.quantised_on(model) if models.use_4bit(args) else None,
            dtype=str(model.get_base_model().dtype),
            frozen_worker=trainer.frozen.record(),
        )
    resumes = checkpoint is not None
    wandb_callback = records.add_wandb(args, trainer, samples, resumes=resumes) if main_process and args.wandb else None
    scoring = Scoring(args, model, tokenizer, executor)
    if held_out:
        with stoppable(lambda: how_to_continue(output_dir)):
            scoring.before(held_out)

    if checkpoint is not None and trainer.worker is not None:
        trainer.worker.load_answers(answers_file(checkpoint, trainer.accelerator.process_index))
    with callbacks.StopOnSignal() as stopper:
        trainer.add_callback(stopper)
        try:
            # If the run was stopped after its very last step, the trainer would do one step too many.
            if checkpoint is not None and checkpoint_step(checkpoint) >= args.max_steps:
                models.load_adapter_weights(model, str(checkpoint))
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
        return callbacks.stopped_early("grpo_training.py", stopper.received, trainer.state, output_dir)
    trainer.frozen.measure(model, step=args.max_steps, adapter_path=args.adapter_path)
    if main_process:
        records.add_to_record(output_dir, frozen_worker=trainer.frozen.record())
        finish(args, trainer, tokenizer, output_dir, dated=facts["prompt_date"] is not None)
    if held_out:
        with stoppable(lambda: how_to_continue(output_dir)):
            scoring.after(held_out)
    return 0


def build_trainer(
    args: TrainingArgs, questions: list[Question], tokenizer: Any, samples: SampleLog | None = None
) -> tuple[PlannerTrainer, PipelineExecutor]:
    """TRL's trainer with the planner's adapter, and the pipeline that carries out its plans.

    The pipeline's worker is the trainer's own model, unless the settings name a server for it.

    Args:
        args: settings of the run.
        questions: to train on.
        tokenizer: of the base model.
        samples: receives the samples of each batch, or None.

    Raises:
        UserError: for too few questions, for plans that may outgrow the model's context, for a model or adapter that
            cannot be loaded, or for an adapter that changes the base model.
    """
    check_enough(args, len(questions))
    progress.tell_whole_warmup(args.warmup_steps, args.max_steps)
    encoder = SentenceEncoder(args.embedding_model)
    encoder.load()
    four_bit = models.use_4bit(args)
    base = models.load_base(args.base_model, four_bit=four_bit, cpu_dtype=models.cpu_dtype(args))
    check_plan_fits(args, longest_planner_prompt(args, questions, tokenizer), context_of(base.config))
    announce_device(args)
    frozen = FrozenBase(base, tokenizer)
    # The executor is needed to build the trainer, and uses the trainer's model; the trainer is put in here afterwards.
    holder: list[GRPOTrainer] = []
    clock = StepClock()
    executor = run_executor(args, lambda: holder[0].accelerator.unwrap_model(holder[0].model), tokenizer, encoder)
    reward = PipelineRewardFunction(
        executor, RewardWeights.from_settings(args), eos_ids=end_token_ids(base, tokenizer), sink=samples, clock=clock
    )
    fold = not prompts.accepts_system(tokenizer)
    trainer = PlannerTrainer(
        clock=clock,
        frozen=frozen,
        cpu_dtype=models.cpu_dtype(args),
        model=base,
        reward_funcs=[reward],
        args=grpo_config(args, base.config),
        train_dataset=Dataset.from_list([planner_row(item, args, fold) for item in questions]),
        processing_class=tokenizer,
        peft_config=models.lora_config(args, base),
        callbacks=[
            callbacks.ReportCallback(Path(args.output_dir)),
            callbacks.FollowSettings(),
            callbacks.ReturnMemory(),
            callbacks.DropReplacedRun(Path(args.output_dir)),
            callbacks.CollapseWarning(),
            callbacks.InvalidWarning(),
            progress.ProgressCallback(),
        ],
    )
    holder.append(trainer)
    if isinstance(executor.worker, FrozenWorker):
        trainer.worker = executor.worker
    if args.vllm_url is not None:
        planner = ServedPlanner.from_settings(
            args,
            save=trainer.save_for_server,
            end_ids=sorted(end_token_ids(base, tokenizer)),
            step=lambda: trainer.state.global_step,
        )
        reward.rollout_errors = lambda: planner.errors
        full_precision = not (four_bit or trainer.args.bf16 or trainer.args.fp16)
        check = PolicyCheck.of(args.vllm_max_gap, full_precision=full_precision)
        assert isinstance(executor.worker, ServerWorker)
        trainer.sample_from(planner, check, executor.worker.model)
    trainer.remove_callback(transformers.PrinterCallback)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.adapter_path is not None:
        models.load_adapter_weights(model, args.adapter_path)
        if args.beta > 0:
            models.add_reference_adapter(model)
    models.train_in_fp32(model)
    frozen.measure(model, step=0, adapter_path=args.adapter_path)
    return trainer, executor


def planner_row(item: Question, args: TrainingArgs, fold_system: bool) -> dict[str, Any]:
    """A row of the data set. Question and gold answer have their own columns, so no prompt has to be parsed."""
    messages = prompts.planner_messages(item.question, args.planner_style, args.worker_context)
    prompt = prompts.fold_system(messages) if fold_system else messages
    return {"prompt": prompt, "question": item.question, "answer": item.answer}


def grpo_config(args: TrainingArgs, base: Any) -> GRPOConfig:
    """The settings of TRL's trainer for a run. `base` is the base model's config."""
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
        # Set explicitly, because TRL's defaults have changed between versions.
        loss_type=args.loss_type,
        epsilon=args.epsilon,
        mask_truncated_completions=args.mask_truncated,
        scale_rewards=args.scale_rewards,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        logging_steps=1,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        report_to=[],
        disable_tqdm=True,
        ddp_timeout=PATIENCE_SECONDS,
        **device_options(args, base),
    )


def finish(args: TrainingArgs, trainer: GRPOTrainer, tokenizer: Any, output_dir: Path, *, dated: bool) -> None:
    """Save the adapter, draw the curves, and print what the result is and what to do next.

    Args:
        args: settings of the run.
        trainer: after its training.
        tokenizer: of the model.
        output_dir: of the run.
        dated: whether the chat template contains the run's date. A server would show today's date instead.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    save_adapter(model, tokenizer, output_dir)
    metrics = output_dir / "metrics.jsonl"
    plot_training_curves(metrics, output_dir / "training_curves.png")
    lines = read_jsonl(metrics)
    print(summary_table(lines))
    if rows := breakdown_rows(lines):
        print(f"\n{format_table(rows)}")
    print(f"\nadapter, samples and curves: {output_dir}")
    command = server_command(
        models.resolve_model(args.base_model),
        output_dir,
        cpu=not torch.cuda.is_available(),
        # vLLM does not know the project's chat template for a base model without one, nor the date of the run.
        chat_template=str(output_dir.absolute() / "chat_template.jinja")
        if dated or tokenizer.chat_template == prompts.PLAIN_CHAT_TEMPLATE
        else None,
    )
    print(f"serve it with vLLM, and ask it with inference_vllm.py:\n  {shown_command(command)}")
