"""A Weights & Biases run: started without asking a question or waiting for a network, and gone on with after a stop.

Online only when an API key is known and the server answers; otherwise it logs to disk and says in one line why, and
how to upload later.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import shlex
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.runs.files import read_json, write_json
from common.runs.record import WANDB_RUN
from common.settings.secrets import WANDB_VARIABLE, clean_key, redact, redact_logs

CONNECT_SECONDS = 3.0  # to reach the server at all
INIT_SECONDS = 15.0  # for a server that accepts the connection and then does not answer
FINISH_SECONDS = 120.0  # to upload the rest at the end; what is left stays on disk for `wandb sync`


class Progress:
    """How far a run has been logged, in a file beside it, so that after a stop it goes on in the same W&B run.

    W&B cannot take a step back: what a resumed training does again, since its checkpoint, is not logged again.

    Args:
        output_dir: of the training.
        project: the W&B project.
        resumes: whether training goes on; otherwise, and in another project, a new W&B run begins.
    """

    def __init__(self, output_dir: Path, project: str, *, resumes: bool) -> None:
        self._path = output_dir / WANDB_RUN
        self._project = project
        stored = (read_json(self._path) or {}) if resumes else {}
        if stored.get("project") != project:
            stored = {}
        self.run_id: str | None = stored.get("id")  # None: W&B chooses one
        self.step: int = stored.get("step", 0)  # of the training, the last one that is logged
        self.rows: int = stored.get("rows", 0)  # in the run's history, W&B's own count of steps

    def save(self) -> None:
        """Write down how far it is."""
        write_json(self._path, {"project": self._project, "id": self.run_id, "step": self.step, "rows": self.rows})


def start_wandb(
    project: str,
    run_name: str | None,
    config: Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    run_id: str | None = None,
) -> Any | None:
    """Start a W&B run that writes to `output_dir/wandb`; None where W&B is switched off or broken.

    Online only with an API key (WANDB_API_KEY, netrc, W&B settings) and a server, or its proxy, that
    accepts a connection within three seconds; otherwise offline, with one line on stderr. WANDB_MODE
    (offline, disabled) is obeyed; WANDB_MODE=online is a wish that still cannot hang the run.
    With `run_id` the run of that id goes on, offline in one more folder. Call it on the main process only.
    Raises UserError for input that W&B refuses.
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
    if offline_because is None and run_id is not None and _not_uploaded(output_dir, run_id):
        # Uploaded after this part, it would replace it: W&B puts parts together only in the order of time.
        offline_because = "the run's earlier part is not uploaded yet"
    if offline_because is None:
        try:
            run = _init(wandb, "online", project, run_name, config, output_dir, run_id)
        except Exception as error:  # noqa: BLE001  (whatever wandb raises must not end a training run)
            offline_because = f"the server did not start a run: {_one_line(error)}"
            redact_logs(output_dir / "wandb")  # its answers are in there, and what it was asked with may be in these
        else:
            print(f"wandb: run {run.name} at {run.url}", file=sys.stderr)
            return run
    try:
        run = _init(wandb, "offline", project, run_name, config, output_dir, run_id)
    except Exception as error:  # noqa: BLE001
        print(f"wandb: off ({_one_line(error)})", file=sys.stderr)
        return None
    parts = _not_uploaded(output_dir, run.id) or [Path(run.settings.sync_dir)]
    upload = shlex.join(["wandb", "sync", *(str(part.resolve()) for part in parts)])
    print(f"wandb: offline ({offline_because}); upload later with: {upload}", file=sys.stderr)
    return run


def _not_uploaded(output_dir: Path, run_id: str) -> list[Path]:
    """Folders of a run's offline parts that `wandb sync` has not marked as uploaded, in the order of time."""
    parts = sorted((output_dir / "wandb").glob(f"offline-run-*-{glob.escape(run_id)}"))
    return [part for part in parts if not any(part.glob("*.wandb.synced"))]


def _init(
    wandb: Any,
    mode: str,
    project: str,
    run_name: str | None,
    config: Mapping[str, Any],
    output_dir: Path,
    run_id: str | None,
) -> Any:
    settings = wandb.Settings(
        silent=True,  # the one line of start_wandb says all that matters
        console="off",  # capturing stdout breaks progress bars
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )
    run = wandb.init(
        project=project,
        name=run_name,
        config=_plain(config),
        dir=str(output_dir),
        mode=mode,
        settings=settings,
        id=run_id,
        resume=None if run_id is None else "allow",
        allow_val_change=run_id is not None,  # such as more steps
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
