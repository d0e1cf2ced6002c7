"""Progress of a run on the terminal: one bar, or plain lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.cli import counted, say
from common.reports.metrics import step_metrics


class ProgressCallback(TrainerCallback):
    """Shows one progress bar with reward and rates on stderr, or plain lines if stderr is not a terminal.

    It replaces the Trainer's own output, which prints every metric of every step. For that, set `disable_tqdm=True`, so
    that the Trainer adds its PrinterCallback instead of its bar, and call `trainer.remove_callback(PrinterCallback)`.

    Without a terminal (nohup, CI, a job scheduler) a line is printed after the first and the last step. Between them
    there is one after ten steps or about ten seconds, whichever is first.
    """

    SECONDS_PER_LINE = 10.0
    STEPS_PER_LINE = 10
    SHOWN = (
        ("reward", "reward", ".3f"),
        ("correct", "correctness", ".0%"),
        ("invalid", "invalid_plan_rate", ".0%"),
        ("decomposed", "decomposition_rate", ".0%"),
    )

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._plain = False
        self._shown: dict[str, str] = {}
        self._first_step = 0
        self._started = 0.0
        self._line_step: int | None = None
        self._line_time = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, or note the time for plain lines."""
        if not state.is_world_process_zero:
            return
        self._first_step, self._started, self._line_step = state.global_step, time.monotonic(), None
        self._plain = not sys.stderr.isatty()
        if not self._plain:
            try:
                sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            except (OSError, ValueError):
                sized = False
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                # No rate and no description: the numbers must fit into 80 columns, and the bar takes the rest.
                bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
                # A terminal of unknown size (docker exec -t, script) reports 0 by 0; tqdm would then draw nothing.
                dynamic_ncols=sized,
                ncols=None if sized else 80,
                nrows=None if sized else 24,
                file=sys.stderr,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar, or print a line if one is due."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        elif not control.should_log:  # otherwise on_log prints the line with the numbers of this step
            self._print_line(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the numbers of the latest step."""
        metrics = step_metrics(logs)
        if metrics is None:
            return
        shown = {
            label: format(metrics[name], style) for label, name, style in self.SHOWN if metrics.get(name) is not None
        }
        if not shown and metrics.get("loss") is not None:  # supervised training has no reward
            shown = {"loss": format(metrics["loss"], ".3f")}
        self._shown = shown
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(f"{label} {value}" for label, value in shown.items()))
        else:
            self._print_line(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the last line or close the bar."""
        if self._line_step != state.global_step:
            self._print_line(state, force=True)
        self.close()

    def close(self) -> None:
        """Close the bar and leave it on the screen. Call it also if training ends with an exception."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._plain = False

    def _print_line(self, state: TrainerState, force: bool = False) -> None:
        if not self._plain or state.global_step == 0:
            return
        now = time.monotonic()
        due = (
            self._line_step is None
            or state.global_step - self._line_step >= self.STEPS_PER_LINE
            or now - self._line_time >= self.SECONDS_PER_LINE
            or state.global_step >= state.max_steps
        )
        if not (due or force) or self._line_step == state.global_step:
            return
        self._line_step, self._line_time = state.global_step, now
        parts = [f"step {state.global_step}/{state.max_steps}"]
        parts += [f"{label} {value}" for label, value in self._shown.items()]
        done = state.global_step - self._first_step
        if done > 0:
            pace = (now - self._started) / done
            parts.append(f"{pace:.1f} s/step")
            left = max(0, state.max_steps - state.global_step)
            parts.append(f"{tqdm.format_interval(pace * left)} left")
        print("  ".join(parts), file=sys.stderr, flush=True)


def tell_whole_warmup(warmup_steps: int, steps: int) -> None:
    """Tell of a warm-up that is as long as the run. It is no error: a short trial of a long run's command has one."""
    if warmup_steps >= steps:
        say(
            f"--warmup-steps {warmup_steps}: in the run's {counted(steps, 'step')} the learning rate never reaches --lr"
        )
