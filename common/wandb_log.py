"""Start Weights & Biases without ever asking a question or waiting for a network that is not there.

`start_wandb` goes online only when an API key is known and the server answers; otherwise it logs to
disk and says in one line why, and how to upload later. What is logged during training is the work
of `common.callbacks.WandbCallback`, under the names of `wandb_name`.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError

__all__ = ["start_wandb", "wandb_name"]

CONNECT_SECONDS = 3.0  # to reach the server at all
INIT_SECONDS = 30.0  # for a server that accepts the connection and then does not answer
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
        else:
            print(f"wandb: run {run.name} at {run.url}", file=sys.stderr)
            return run
    try:
        run = _init(wandb, "offline", project, run_name, config, output_dir)
    except Exception as error:  # noqa: BLE001
        print(f"wandb: off ({_one_line(error)})", file=sys.stderr)
        return None
    upload = f"wandb sync {run.settings.sync_dir}"
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
    return " ".join(str(error).split())[:300] or type(error).__name__
