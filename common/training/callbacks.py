"""Trainer callbacks for what a run writes and shows while it trains, and for signals.

ReportCallback     writes metrics.jsonl and training_curves.png
DropReplacedRun    removes the run that --overwrite replaces, after the first checkpoint
ReturnMemory       gives freed memory back to the system after some steps on a CPU
FollowSettings     lets a resumed run follow its new --save-steps and --max-steps
CollapseWarning    warns if the reward rises while all plans become the same
InvalidWarning     warns if no plan is valid, so that nothing can be learned
StopOnSignal       ends the run after a checkpoint on Ctrl-C and SIGTERM

The first and the two warnings need only the trainer's logs, which they receive in `on_log`. The callback for W&B is in
`common.reports.wandb_log`, the one for progress lines in `common.training.progress`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.cli import say
from common.processes.heap import return_freed_memory
from common.processes.launcher import is_elastic, patience_hint
from common.processes.ranks import wait_for_all
from common.reports.jsonl import append_jsonl, truncate_jsonl_after
from common.reports.metrics import step_metrics
from common.reports.plots import plot_training_curves
from common.runs.folder import drop_replaced
from common.runs.storage import resume_command

logger = logging.getLogger(__name__)


class ReportCallback(TrainerCallback):
    """Writes `metrics.jsonl`, one line per logged step, and redraws `training_curves.png`.

    When training resumes, lines after the checkpoint's step are removed first. A new run appends to an existing file:
    the script has already decided what happens to an older run.

    Args:
        output_dir: of the run.
        plot_every: steps between two drawings; 0 draws only at the end.
        plot: draws a metrics file into a PNG.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        plot_every: int = 10,
        plot: Callable[[Path, Path], None] = plot_training_curves,
    ) -> None:
        self.metrics_path = Path(output_dir) / "metrics.jsonl"
        self.plot_path = Path(output_dir) / "training_curves.png"
        self.plot_every = plot_every
        self.plot = plot
        self._plotted_at = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove lines after the checkpoint from which training resumes."""
        if state.is_world_process_zero and state.global_step > 0:
            truncate_jsonl_after(self.metrics_path, state.global_step)
        self._plotted_at = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the numbers of a step or of an evaluation, and draw the curves if it is time."""
        metrics = step_metrics(logs) if state.is_world_process_zero else None
        if metrics is None:
            if state.is_world_process_zero and logs and "eval_loss" in logs:
                append_jsonl(self.metrics_path, {"step": state.global_step, "eval_loss": logs["eval_loss"]})
            return
        own = {"step": state.global_step, "time": round(time.time(), 3)}
        append_jsonl(self.metrics_path, {**own, **{k: v for k, v in metrics.items() if k not in own}})
        if self.plot_every and state.global_step - self._plotted_at >= self.plot_every:
            self._plot(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the curves of the whole run."""
        if state.is_world_process_zero and self.metrics_path.exists():
            self._plot(state.global_step)

    def _plot(self, step: int) -> None:
        self._plotted_at = step
        try:
            self.plot(self.metrics_path, self.plot_path)
        except Exception as error:  # noqa: BLE001  (a failed drawing must not end the run)
            logger.warning("could not draw %s: %s: %s", self.plot_path, type(error).__name__, error)


class DropReplacedRun(TrainerCallback):
    """Removes the run that `--overwrite` replaces, as soon as the new run has its first checkpoint."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._saved = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the replaced run after the first checkpoint, when all processes have written their parts of it."""
        if not self._saved:
            wait_for_all()  # until each process has written its part of the checkpoint
            if state.is_world_process_zero:
                drop_replaced(self._output_dir)
        self._saved = True


class ReturnMemory(TrainerCallback):
    """Gives memory that steps on a CPU have freed back to the system: the supervised demo's peak falls by a fifth.

    The gaps grow slowly, and the next step must request anew what it needs, so it is not done after every step.
    """

    EVERY_STEPS = 4

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give it back; no effect with a GPU, where little is freed."""
        if args.use_cpu and state.global_step % self.EVERY_STEPS == 0:
            return_freed_memory()


class FollowSettings(TrainerCallback):
    """Lets a resumed run follow the settings that it may change; the checkpoint holds those of the earlier run."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the steps between checkpoints, and the learning rate for the new number of steps.

        The optimizer's state holds the rate of the next step by the earlier schedule, which is 0 after its last step.
        """
        from torch.optim.lr_scheduler import LambdaLR

        if state.global_step == 0:
            return
        state.compute_steps(args, state.max_steps)
        schedule = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])  # accelerate wraps it
        if isinstance(schedule, LambdaLR):
            groups = zip(kwargs["optimizer"].param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, base, factor in groups:
                group["lr"] = base * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]  # what is logged


class StepWarning(TrainerCallback):
    """Base of the warnings: passes the numbers of each training step on, in the first process only."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at a step, if the log is that of one."""
        metrics = step_metrics(logs) if state.is_world_process_zero else None
        if metrics is not None:
            self.look_at(state.global_step, metrics)

    def look_at(self, step: int, metrics: dict[str, Any]) -> None:
        """Warn if the metrics of this step give reason to."""
        raise NotImplementedError


class CollapseWarning(StepWarning):
    """Warns when the reward rises while nearly all plans are the same text.

    This is the known way to earn this reward without planning (docs/training.md). One template for every question has
    high efficiency and independence, but gives no correct answers.

    Args:
        window: steps; the last `window` logged steps are compared with the `window` steps before them.
        threshold: share of distinct plans in [0, 1] below which plans count as the same.
        quiet_steps: least number of steps between two warnings.
    """

    def __init__(self, window: int = 10, threshold: float = 0.2, quiet_steps: int = 20) -> None:
        self.window = window
        self.threshold = threshold
        self.quiet_steps = quiet_steps
        self._history: deque[tuple[float, float]] = deque(maxlen=2 * window)  # (share of distinct plans, reward)
        self._warned_at: int | None = None

    def look_at(self, step: int, metrics: dict[str, Any]) -> None:
        """Record the numbers of a step, and warn if plans have become the same."""
        if metrics.get("distinct_plans") is None or metrics.get("reward") is None:
            return
        self._history.append((metrics["distinct_plans"], metrics["reward"]))
        if len(self._history) < 2 * self.window:
            return
        before, last = list(self._history)[: self.window], list(self._history)[self.window :]
        distinct = _mean(d for d, _ in last)
        reward_before, reward_last = _mean(r for _, r in before), _mean(r for _, r in last)
        quiet = self._warned_at is not None and step - self._warned_at < self.quiet_steps
        if distinct < self.threshold and reward_last > reward_before and not quiet:
            self._warned_at = step
            logger.warning(
                "step %d: the plans collapse: only %.0f%% of them differ over the last %d logged steps while the "
                "reward rose from %.3f to %.3f; look at the plans, gate the reward on correctness or warm up first",
                step,
                100 * distinct,
                self.window,
                reward_before,
                reward_last,
            )


class InvalidWarning(StepWarning):
    """Warns once when all plans of some steps in a row are invalid. They all earn 0, so that nothing can be learned.

    Args:
        steps: number of these steps.
    """

    def __init__(self, steps: int = 2) -> None:
        self.steps = steps
        self._in_a_row = 0

    def look_at(self, step: int, metrics: dict[str, Any]) -> None:
        """Count the steps, and warn with what helps."""
        if metrics.get("invalid_plan_rate") is None:
            return
        self._in_a_row = self._in_a_row + 1 if metrics["invalid_plan_rate"] == 1 else 0
        if self._in_a_row != self.steps:
            return
        cut_off = metrics.get("completions/clipped_ratio") or 0.0
        longer = f"{cut_off:.0%} of them were cut off: raise --max-completion-length; or " if cut_off >= 0.5 else ""
        logger.warning(
            "step %d: all plans of the last %d steps are invalid, so nothing is learned: %steach the planner the "
            "format first, or for longer, with dummy_planner.py --format json-plan, and start from that adapter "
            "(--adapter-path)",
            step,
            self.steps,
            longer,
        )


class StopOnSignal(TrainerCallback):
    """Ends a run after the current step, with a checkpoint, on the first SIGINT or SIGTERM.

        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.train()
        if stop.received: ...   # signal.SIGINT or signal.SIGTERM

    A second signal raises KeyboardInterrupt at once.

    With several processes, all stop at the same step, even if only one of them received the signal. If one stopped
    alone, the others would wait for it forever. Afterwards `received` is the signal in all of them.

    A launcher repeats a signal that the processes have already received themselves. It also sends SIGTERM to the
    remaining processes after the first one has ended. Neither counts as a second signal.
    """

    REPEATED_SECONDS = 2.0  # a signal this soon after the first one is the launcher's repetition of it
    _NOTICE = b"\nsaving a checkpoint after this step; press again to quit at once\n"

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._pid = 0
        self._launched = is_elastic()
        self._since = 0.0  # time of the signal, in seconds of the monotonic clock
        self._decided = False  # all processes save a checkpoint and stop

    def __enter__(self) -> StopOnSignal:
        self._pid = os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # allowed only in the main thread; a notebook may use another one
                logger.warning("not in the main thread: %s will end the run without a checkpoint", number.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            if self._decided and self._launched and number == signal.SIGTERM:
                previous = signal.SIG_IGN  # the launcher sends it to processes that have not ended yet
            # None: the old handler was not set from Python, so it cannot be set again from Python.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # This runs between any two instructions of the main thread, which may hold the lock of a stream or of logging
        # at that moment. So it does nothing but os.write and assignments.
        if os.getpid() != self._pid:  # a forked child (a data loader's worker) inherits the handler
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.received is not None:
            repeated = time.monotonic() - self._since < self.REPEATED_SECONDS
            if self._launched and (repeated or (self._decided and number == signal.SIGTERM)):
                return
            raise KeyboardInterrupt
        self.received, self._since = signal.Signals(number), time.monotonic()
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, self._NOTICE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print how to raise the launcher's time limit, if it may be too short for a step."""
        if hint := patience_hint():
            say(hint)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop if this or another process has received a signal."""
        number = self._any_process_got(args)
        if number:
            if self.received is None:
                self._since = time.monotonic()  # only another process has received it so far
            self._decided, self.received = True, signal.Signals(number)
            control.should_save = True
            control.should_training_stop = True
        return control

    def _any_process_got(self, args: TrainingArguments) -> int:
        """The signal that this or another process has received; 0 if there was none."""
        import torch
        import torch.distributed as dist

        here = int(self.received or 0)
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return here
        flag = torch.tensor([here], device=args.device)  # (1,)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag.item())


def stopped_early(script: str, received: int, state: TrainerState, output_dir: Path) -> int:
    """Print the command that continues a stopped run. All processes must call it.

    Args:
        script: name of the script.
        received: number of the signal.
        state: of the trainer.
        output_dir: of the run.

    Returns:
        The exit code, 128 + `received`. No process returns before all have come here.
    """
    say(
        f"stopped after step {state.global_step} of {state.max_steps}; continue with\n"
        f"  {resume_command(script, output_dir)}"
    )
    wait_for_all()
    return 128 + received


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
