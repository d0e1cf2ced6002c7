"""Files that a run writes while it trains, besides its metrics: settings and samples; also the W&B log."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.processes.ranks import world_size
from common.reports.jsonl import append_jsonl, truncate_jsonl_after
from common.runs.checkpoints import checkpoint_step
from common.runs.files import read_json, write_json
from common.runs.folder import set_aside
from common.runs.record import TRAINING_CONFIG, run_record, stored_date
from common.settings.fields import absolute_paths
from common.settings.grpo import TrainingArgs
from common.settings.sft import SupervisedArgs


class SampleLog:
    """Appends the sample records of every batch to `samples.jsonl`. Only the first process calls it.

    Attributes:
        listeners: functions that also receive each batch's records, for example for W&B.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.listeners: list[Any] = []

    def __call__(self, records: list[dict[str, Any]]) -> None:
        """Write one batch: the records of all processes."""
        for record in records:
            append_jsonl(self._path, record)
        for listener in self.listeners:
            listener(records)


class WithoutCard:
    """For trainers of TRL: no model card at each checkpoint. TRL's names no model and asks about a time machine."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write nothing."""


def prompt_date(args: TrainingArgs | SupervisedArgs, checkpoint: Path | None) -> date:
    """The date that prompts show: that of the resumed run, that of the warm start, or today.

    Args:
        args: settings of the run.
        checkpoint: to resume from, or None.

    Raises:
        UserError: if the stored date is not a date.
    """
    folder = args.output_dir if checkpoint is not None else args.adapter_path
    path = None if folder is None else Path(folder) / TRAINING_CONFIG
    record = {} if path is None else read_json(path) or {}
    try:
        return stored_date(record) or date.today()
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from the run that wrote it") from error


def add_to_record(output_dir: Path, **facts: Any) -> None:
    """Add facts that are known only at the end of a run to its `training_config.json`."""
    path = output_dir / TRAINING_CONFIG
    write_json(path, {**(read_json(path) or {}), **facts})


def start_records(args: TrainingArgs | SupervisedArgs, checkpoint: Path | None, *, script: str, **facts: Any) -> None:
    """Move an older run aside for a new one, store the settings, and remove lines of steps after the checkpoint.

    Call it only after everything is loaded, so that an older run stays unchanged if loading fails.

    Args:
        args: settings of the run.
        checkpoint: to resume from, or None for a new run. The steps after it run again, so their lines are removed.
        script: name of the script.
        facts: additional entries of `training_config.json`, for example the data's fingerprint.
    """
    output_dir = Path(args.output_dir)
    if checkpoint is None:
        set_aside(output_dir)
    record = run_record(absolute_paths(args), script=script, seed=args.seed, processes=world_size(), **facts)
    write_json(output_dir / TRAINING_CONFIG, record)
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    for name in ("metrics.jsonl", "samples.jsonl"):
        truncate_jsonl_after(output_dir / name, step)


def checkpoint_bytes(trainer: Any) -> int:
    """Approximate size of a checkpoint in bytes: adapter, Adam's two moments of each of its weights, tokenizer."""
    weights = sum(4 * parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    backend = getattr(trainer.processing_class, "backend_tokenizer", None)
    return 3 * weights + (0 if backend is None else len(backend.to_str().encode()))


def add_wandb(
    args: TrainingArgs | SupervisedArgs, trainer: Any, samples: SampleLog | None = None, *, resumes: bool
) -> Any:
    """Log to W&B too. Returns the callback, or None if W&B is switched off or does not work.

    Args:
        args: settings of the run.
        trainer: the callback is added to it.
        samples: source of the rows of the table, or None.
        resumes: whether to continue the W&B run of the same output folder.
    """
    from common.reports import wandb_log, wandb_run  # imported here, so that --no-wandb does not import them

    output_dir = Path(args.output_dir)
    progress = wandb_run.Progress(output_dir, args.wandb_project, resumes=resumes)
    started = wandb_run.start_wandb(
        args.wandb_project, args.wandb_run_name, args.to_dict(), output_dir, progress.run_id
    )
    if started is None:
        return None
    callback = wandb_log.WandbCallback(progress=progress)
    trainer.add_callback(callback)
    if samples is not None:
        samples.listeners.append(callback.add_samples)
    return callback
