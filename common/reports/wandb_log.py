"""Log a training to Weights & Biases: metrics, a histogram of rewards, and a table of examples.

run = start_wandb(project, None, config, output_dir)  # common.reports.wandb_run
if run is not None:
    callback = WandbCallback(run)
    trainer.add_callback(callback)        # and pass the samples of the reward function to callback.add_samples
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.reports.jsonl import is_finite
from common.reports.metrics import step_metrics
from common.reports.wandb_run import Progress, not_uploaded
from common.settings.secrets import redact, redact_logs

logger = logging.getLogger(__name__)

# Names that Trainer and GRPOTrainer log without a prefix, and their names in W&B.
_RENAMED = {
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "reward/frac_zero_std",
    **{
        name: f"train/{name}"
        for name in ("loss", "grad_norm", "learning_rate", "epoch", "entropy", "kl", "num_tokens", "step_time")
    },
}


def wandb_name(name: str) -> str:
    """The name of a logged metric in W&B; the part before the slash is the chart group.

    - `reward*` goes to reward/ (reward/mean, reward/std, reward/frac_zero_std);
    - the optimiser's numbers go to train/ (train/loss, ...), and so do `train_runtime` and the other totals;
    - `eval_x` becomes eval/x;
    - names with a slash (completions/mean_length) and this project's own metrics (correctness, decomposition_rate,
      token_efficiency, ...) stay as in metrics.jsonl.
    """
    if name in _RENAMED:
        return _RENAMED[name]
    for prefix in ("eval_", "train_"):
        if name.startswith(prefix):
            return f"{prefix[:-1]}/{name.removeprefix(prefix)}"
    return name


class WandbCallback(TrainerCallback):
    """Log every step to a W&B run: metrics, `reward/distribution` and the table `examples`.

    Metric names follow `wandb_name`; the x axis is `train/global_step`. The reward function passes its samples to
    `add_samples`. Each logged step then gets a histogram of their rewards and up to `rows_per_step` rows of the
    table. The rows are spread from the lowest to the highest reward.

    The table is logged in increments, because under one key W&B shows only the latest table. W&B shows the last 100
    increments of a run, so in long runs one increment holds several steps. `on_train_end` or `close` sends the rest.

    An error of W&B is logged once as a warning and never ends the training.

    Args:
        run: the W&B run; None for the one that is active.
        rows_per_step: most rows of the table per step.
        progress: what was logged before the training was stopped; None if nothing is to be remembered.

    Raises:
        ValueError: if `run` is None and no W&B run is active.
    """

    COLUMNS = (
        "step",
        "reward",
        "correct",
        "question",
        "plan",
        "solutions",
        "answer",
        "gold",
        "completion",
        "other",
    )
    MAX_INCREMENTS = 90

    def __init__(self, run: Any | None = None, rows_per_step: int = 8, progress: Progress | None = None) -> None:
        import wandb

        self.run: Any = wandb.run if run is None else run
        if self.run is None:
            raise ValueError("there is no W&B run: call start_wandb first")
        self.rows_per_step = rows_per_step
        self._progress = progress
        self._logged_before = 0 if progress is None else progress.step
        if progress is not None:
            progress.run_id = self.run.id
            progress.rows = max(progress.rows, int(self.run.step))  # W&B's own count, if the run continues online
            progress.save()
        self._samples: list[Mapping[str, Any]] = []
        self._table: Any = None
        self._unsent_rows = 0
        self._logs_since_table = 0
        self._warned = False
        self._step = 0

    def add_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add the samples of one batch; they are logged with the step they belong to.

        Args:
            samples: with the keys step, question, completion, plan (dict or None), solutions, answer, gold, correct
                and reward (None if the worker failed). Other keys go to the column `other` as JSON.
        """
        self._samples.extend(samples)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the numbers of a step, or of an evaluation, with the samples that belong to it."""
        if not state.is_world_process_zero or not logs:
            return
        self._step = state.global_step
        if self._step <= self._logged_before:  # repeated since the last checkpoint, so already in W&B
            self._samples = []
            return
        with self._never_fatal():
            metrics = step_metrics(logs)
            if metrics is None:  # an evaluation, or the totals at the end of training
                self._log(_numbers(logs))
                return
            data = _numbers(metrics)
            samples, self._samples = self._samples, []
            self._log({**data, **self._histogram(samples), **self._examples(samples, args, state)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send the table rows of the last steps."""
        if state.is_world_process_zero:
            self._step = state.global_step
            self.flush()

    def flush(self) -> None:
        """Send table rows that wait for their increment."""
        with self._never_fatal():
            if self._samples:  # their step was never logged, because the run was stopped
                self._add_rows(self._samples)
                self._samples = []
            if self._unsent_rows:
                self._log(self._take_table())

    def close(self) -> None:
        """Send the rest and finish the run. Meant for `finally`, so also after an interrupted training.

        If the server does not take the rest in time, one line on stderr says how to upload it later.
        """
        self.flush()
        with self._never_fatal():
            try:
                self.run.finish()
            except TimeoutError:
                print(not_uploaded(self.run), file=sys.stderr)
            finally:  # the logs may hold requests and answers with the key
                redact_logs(Path(self.run.settings.wandb_dir))

    def _log(self, data: dict[str, Any]) -> None:
        if not data:
            return
        row = {**data, "train/global_step": self._step}
        if self._progress is None:
            self.run.log(row)
            return
        self.run.log(row, step=self._progress.rows, commit=True)
        self._progress.rows += 1
        self._progress.step = max(self._progress.step, self._step)
        self._progress.save()

    def _histogram(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        import wandb

        rewards = [float(s["reward"]) for s in samples if is_finite(s.get("reward"))]
        return {"reward/distribution": wandb.Histogram(rewards)} if rewards else {}

    def _examples(
        self, samples: list[Mapping[str, Any]], args: TrainingArguments, state: TrainerState
    ) -> dict[str, Any]:
        self._add_rows(samples)
        self._logs_since_table += 1
        logs_in_run = max(1, state.max_steps // max(1, int(state.logging_steps or 1)))
        if not self._unsent_rows or self._logs_since_table < math.ceil(logs_in_run / self.MAX_INCREMENTS):
            return {}
        return self._take_table()

    def _add_rows(self, samples: list[Mapping[str, Any]]) -> None:
        import wandb

        if self._table is None:
            # W&B checks the types of a column's cells. With mixed types allowed, no output of a model can fail it.
            self._table = wandb.Table(columns=list(self.COLUMNS), log_mode="INCREMENTAL", allow_mixed_types=True)
        by_step: dict[Any, list[Mapping[str, Any]]] = {}
        for sample in samples:
            by_step.setdefault(sample.get("step", self._step), []).append(sample)
        for step, of_step in by_step.items():
            for sample in _spread(of_step, self.rows_per_step):
                self._table.add_data(*self._row(step, sample))
                self._unsent_rows += 1

    def _row(self, step: Any, sample: Mapping[str, Any]) -> list[Any]:
        reward = sample.get("reward")
        correct = sample.get("correct")
        other = {key: value for key, value in sample.items() if key not in self.COLUMNS}
        return [
            step,
            float(reward) if reward is not None and is_finite(reward) else None,
            None if correct is None else bool(correct),
            *(_cell(sample.get(name)) for name in self.COLUMNS[3:9]),
            _cell(other) if other else "",
        ]

    def _take_table(self) -> dict[str, Any]:
        self._unsent_rows = self._logs_since_table = 0
        return {"examples": self._table}

    @contextlib.contextmanager
    def _never_fatal(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  (whatever wandb raises: training goes on)
            if not self._warned:
                self._warned = True
                logger.warning("W&B logging failed, training goes on: %s: %s", type(error).__name__, redact(str(error)))


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    return {wandb_name(name): value for name, value in logs.items() if is_finite(value)}


def _spread(samples: list[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Choose `count` samples, evenly from the lowest reward to the highest, so that failures and successes show."""
    ordered = sorted(samples, key=lambda s: s["reward"] if is_finite(s.get("reward")) else -math.inf)
    if len(ordered) <= count:
        return ordered
    if count <= 1:
        return ordered[-count:] if count else []
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def _cell(value: object) -> str | None:
    """Text for a table cell. Half of a surrogate pair, which cannot be encoded, becomes a question mark."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")
