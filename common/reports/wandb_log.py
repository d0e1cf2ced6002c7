"""Weights & Biases, without ever asking a question or waiting for a network that is not there.

`start_wandb` goes online only when an API key is known and the server answers; otherwise it logs to
disk and says in one line why, and how to upload later. `WandbCallback` logs the training: metrics
under the names of `wandb_name`, a histogram of rewards and a table of examples.

    run = start_wandb(project, None, config, output_dir)
    if run is not None:
        callback = WandbCallback(run)
        trainer.add_callback(callback)        # and callback.add_samples to the reward's sample sink
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import shlex
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.errors import UserError
from common.reports.metrics import step_metrics
from common.settings.secrets import WANDB_VARIABLE, clean_key, redact, redact_logs

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 3.0  # to reach the server at all
INIT_SECONDS = 15.0  # for a server that accepts the connection and then does not answer
FINISH_SECONDS = 120.0  # to upload the rest at the end; what is left stays on disk for `wandb sync`

# What the Trainer and GRPOTrainer log without a prefix of their own, by its name in the W&B charts.
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
    """The name of a logged metric in W&B, where the part before the slash names the chart group.

    `reward*` goes to reward/ (reward/mean, reward/std, reward/frac_zero_std); the optimiser's numbers
    to train/ (train/loss, ...); `eval_x` to eval/x; `train_runtime` and the other totals to train/.
    Names with a slash (completions/mean_length) and this project's own metrics (correctness,
    decomposition_rate, token_efficiency, ...) keep the name they have in metrics.jsonl.
    """
    if name in _RENAMED:
        return _RENAMED[name]
    for prefix in ("eval_", "train_"):
        if name.startswith(prefix):
            return f"{prefix[:-1]}/{name.removeprefix(prefix)}"
    return name


def start_wandb(
    project: str, run_name: str | None, config: Mapping[str, Any], output_dir: str | os.PathLike[str]
) -> Any | None:
    """Start a W&B run that writes to `output_dir/wandb`; None where W&B is switched off or broken.

    Online only with an API key (WANDB_API_KEY, netrc, W&B settings) and a server, or its proxy, that
    accepts a connection within three seconds; otherwise offline, with one line on stderr. WANDB_MODE
    (offline, disabled) is obeyed; WANDB_MODE=online is a wish that still cannot hang the run.
    Call it on the main process only. Raises UserError for input that W&B refuses.
    """
    try:
        import wandb
        from wandb.sdk import wandb_setup
    except ImportError as error:
        raise UserError(f"W&B cannot be imported ({error}): pip install wandb, or turn W&B off") from error

    if os.environ.get("WANDB_DISABLED", "").lower() in {"1", "true", "yes", "on"}:
        return None  # wandb itself no longer reads it, but users of the HF Trainer know it
    output_dir = Path(output_dir)
    # For what wandb prints outside a run, such as its notes on logging in: one line of ours is enough.
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        wandb.Settings(project=project, run_name=run_name)  # refuses bad names before anything starts
        known = wandb_setup.singleton().settings
    except Exception as error:  # pydantic's, UsageError or ValueError
        raise UserError(f"W&B does not accept its settings: {_one_line(error)}") from error
    if known.mode == "disabled":
        return None

    (output_dir / "wandb").mkdir(parents=True, exist_ok=True)
    # Tables of an offline run are staged here until `wandb sync`: keep them with the run, not in $HOME.
    os.environ.setdefault("WANDB_DATA_DIR", str((output_dir / "wandb" / "data").resolve()))

    offline_because = _why_offline(known)
    if offline_because is None:
        try:
            run = _init(wandb, "online", project, run_name, config, output_dir)
        except Exception as error:  # noqa: BLE001  (whatever wandb raises must not end a training run)
            offline_because = f"the server did not start a run: {_one_line(error)}"
            redact_logs(output_dir / "wandb")  # its answers are in there, and what it was asked with may be in these
        else:
            print(f"wandb: run {run.name} at {run.url}", file=sys.stderr)
            return run
    try:
        run = _init(wandb, "offline", project, run_name, config, output_dir)
    except Exception as error:  # noqa: BLE001
        print(f"wandb: off ({_one_line(error)})", file=sys.stderr)
        return None
    upload = f"wandb sync {shlex.quote(str(Path(run.settings.sync_dir).resolve()))}"
    print(f"wandb: offline ({offline_because}); upload later with: {upload}", file=sys.stderr)
    return run


def _init(
    wandb: Any, mode: str, project: str, run_name: str | None, config: Mapping[str, Any], output_dir: Path
) -> Any:
    settings = wandb.Settings(
        silent=True,  # the one line of start_wandb says all that matters
        console="off",  # capturing stdout breaks progress bars
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )
    run = wandb.init(
        project=project, name=run_name, config=_plain(config), dir=str(output_dir), mode=mode, settings=settings
    )
    # One x axis for every chart. wandb's own step counts log calls, which differ after a resume.
    run.define_metric("train/global_step", hidden=True)
    run.define_metric("*", step_metric="train/global_step")
    return run


def _why_offline(settings: Any) -> str | None:
    if settings.mode in {"offline", "dryrun"}:
        return "WANDB_MODE=offline" if os.environ.get("WANDB_MODE") else "wandb is set to offline"
    try:
        clean_key(os.environ.get(WANDB_VARIABLE), WANDB_VARIABLE)
        if not _credentials_known(settings.base_url):
            return "no API key: set WANDB_API_KEY or run 'wandb login'"
    except Exception as error:  # noqa: BLE001  (a key in a wrong format, an unreadable netrc)
        return f"no usable API key: {_one_line(error)}"
    host, port = _address_to_reach(settings)
    problem = _cannot_connect(host, port)
    return f"no connection to {host}:{port}: {problem}" if problem else None


def _credentials_known(base_url: str) -> bool:
    from wandb.sdk.lib import wbauth

    # wandb's own look-up: environment, netrc (also under the host's older names), settings. It neither
    # prompts nor connects; a warning about an odd netrc must not add a second line to ours.
    with contextlib.redirect_stderr(io.StringIO()):
        auth = wbauth.authenticate_session(host=base_url, source="start_wandb", prompt=False, update_session=False)
    return auth is not None


def _address_to_reach(settings: Any) -> tuple[str, int]:
    """Host and port of the W&B server, or of the proxy that stands before it."""
    url = urllib.parse.urlsplit(settings.base_url)
    host = url.hostname or ""
    proxy = getattr(settings, f"{url.scheme}_proxy", None)
    if not proxy and not urllib.request.proxy_bypass(host):
        proxy = urllib.request.getproxies().get(url.scheme)
    if proxy:
        url = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host = url.hostname or host
    return host, url.port or (443 if url.scheme == "https" else 80)


def _cannot_connect(host: str, port: int) -> str | None:
    """Why no TCP connection comes about within CONNECT_SECONDS, or None if it does."""
    outcome = ["timed out"]

    def connect() -> None:
        try:
            with socket.create_connection((host, port), timeout=CONNECT_SECONDS):
                outcome[0] = ""
        except (OSError, UnicodeError) as error:
            outcome[0] = getattr(error, "strerror", None) or str(error)

    # In a thread because the timeout of a socket does not cover the look-up of its name.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return outcome[0] or None


def _plain(value: Any) -> Any:
    """The config in types that W&B stores: text for paths, lists for tuples and sets."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _one_line(error: BaseException) -> str:
    text = redact(" ".join(str(error).split()))
    for advice in (" For further information", " Consider increasing"):  # pydantic's, wandb's
        text = text.split(advice)[0]
    return text[:300] or type(error).__name__


class WandbCallback(TrainerCallback):
    """Logs every step to a W&B run: metrics, `reward/distribution` and the table `examples`.

    Metric names follow `wandb_name`; the x axis is `train/global_step`. The reward
    function hands its samples to `add_samples`; each logged step then adds a histogram of their
    rewards and up to `rows_per_step` rows from the lowest to the highest reward.

    The table is logged in increments, so that it keeps the rows of all steps (under one key W&B would
    show only the latest table). W&B shows the last 100 increments of a run, so long runs put several
    steps into one: `on_train_end` or `close` sends what is left.

    A failure of W&B is logged once as a warning and never ends the training.
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

    def __init__(self, run: Any | None = None, rows_per_step: int = 8) -> None:
        import wandb

        self.run: Any = wandb.run if run is None else run
        if self.run is None:
            raise ValueError("there is no W&B run: call start_wandb first")
        self.rows_per_step = rows_per_step
        self._samples: list[Mapping[str, Any]] = []
        self._table: Any = None
        self._unsent_rows = 0
        self._logs_since_table = 0
        self._warned = False
        self._step = 0

    def add_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Take the samples of one batch; they are logged with the step they belong to.

        Keys used: step, question, completion, plan (dict or None), solutions, answer, gold, correct,
        reward (None where the worker failed). Other keys go to the column `other` as JSON.
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
        if not state.is_world_process_zero or not logs:
            return
        self._step = state.global_step
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
        if state.is_world_process_zero:
            self._step = state.global_step
            self.flush()

    def flush(self) -> None:
        """Send table rows that wait for their increment."""
        with self._never_fatal():
            if self._samples:  # a batch whose step was never logged (the run was stopped)
                self._add_rows(self._samples)
                self._samples = []
            if self._unsent_rows:
                self._log(self._take_table())

    def close(self) -> None:
        """Flush and finish the run; for `finally`, also after an interrupted training."""
        self.flush()
        with self._never_fatal():
            self.run.finish()
            redact_logs(Path(self.run.settings.wandb_dir))

    def _log(self, data: dict[str, Any]) -> None:
        if data:
            self.run.log({**data, "train/global_step": self._step})

    def _histogram(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        import wandb

        rewards = [float(s["reward"]) for s in samples if _is_finite(s.get("reward"))]
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
            # Cells are text or None throughout, but a model's output should never meet a type check.
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
            float(reward) if reward is not None and _is_finite(reward) else None,
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
    return {wandb_name(name): value for name, value in logs.items() if _is_finite(value)}


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _spread(samples: list[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` of the samples, evenly from the lowest reward to the highest: failures and successes."""
    ordered = sorted(samples, key=lambda s: s["reward"] if _is_finite(s.get("reward")) else -math.inf)
    if len(ordered) <= count:
        return ordered
    if count <= 1:
        return ordered[-count:] if count else []
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def _cell(value: object) -> str | None:
    """Text for a table cell; half a surrogate pair, which no encoder takes, becomes a question mark."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")
