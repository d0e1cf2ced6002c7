"""Start a Weights & Biases run without asking a question or waiting for the network, and continue it after a stop.

The run is online only if an API key is known and the server answers. Otherwise it is written to disk, and one line
says why and how to upload it later.
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

CONNECT_SECONDS = 3.0  # limit for reaching the server
INIT_SECONDS = 15.0  # limit for starting a run, if the server accepts the connection and then does not answer
FINISH_SECONDS = 120.0  # limit for uploading the rest at the end; what is left stays on disk for `wandb sync`


class Progress:
    """How much of a training was logged, stored in a file in its folder, to continue the same W&B run after a stop.

    W&B does not accept a step twice. So steps that a resumed training repeats since its checkpoint are not logged.

    Args:
        output_dir: folder of the training.
        project: W&B project.
        resumes: whether the training is resumed. If not, or in another project, a new W&B run begins.
    """

    def __init__(self, output_dir: Path, project: str, *, resumes: bool) -> None:
        self._path = output_dir / WANDB_RUN
        self._project = project
        stored = (read_json(self._path) or {}) if resumes else {}
        if stored.get("project") != project:
            stored = {}
        self.run_id: str | None = stored.get("id")  # None: W&B chooses one
        self.step: int = stored.get("step", 0)  # last training step that was logged
        self.rows: int = stored.get("rows", 0)  # rows of the run's history, which W&B counts as its own steps

    def save(self) -> None:
        """Write the progress to its file."""
        write_json(self._path, {"project": self._project, "id": self.run_id, "step": self.step, "rows": self.rows})


def start_wandb(
    project: str,
    run_name: str | None,
    config: Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    run_id: str | None = None,
) -> Any | None:
    """Start a W&B run that writes to `output_dir/wandb`. Call it in the main process only.

    It is online only if there is an API key (WANDB_API_KEY, netrc, W&B settings) and the server, or its proxy,
    accepts a connection within three seconds. Otherwise it is offline, and one line on stderr says so. WANDB_MODE set
    to offline or disabled is obeyed. WANDB_MODE=online is only tried, so that it cannot block the run.

    Args:
        project: W&B project.
        run_name: name of the run; None lets W&B choose one.
        config: settings shown with the run.
        output_dir: folder of the training.
        run_id: continue the run with this id; offline this creates one more folder.

    Returns:
        The run, or None if W&B is switched off or does not work.

    Raises:
        UserError: if W&B cannot be imported or refuses its settings.
    """
    try:
        import wandb
        from wandb.sdk import wandb_setup
    except ImportError as error:
        raise UserError(f"W&B cannot be imported ({error}): pip install wandb, or turn W&B off") from error

    if os.environ.get("WANDB_DISABLED", "").lower() in {"1", "true", "yes", "on"}:
        return None  # wandb itself no longer reads this variable, but users of the HF Trainer know it
    output_dir = Path(output_dir)
    # Silences what wandb prints outside a run, such as notes on logging in: our own line is enough.
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        wandb.Settings(project=project, run_name=run_name)  # refuses invalid names before anything starts
        known = wandb_setup.singleton().settings
    except Exception as error:  # an error of pydantic, a UsageError or a ValueError
        raise UserError(f"W&B does not accept its settings: {_one_line(error)}") from error
    if known.mode == "disabled":
        return None

    (output_dir / "wandb").mkdir(parents=True, exist_ok=True)
    # wandb stages tables of an offline run here until `wandb sync`; the default would be in $HOME.
    os.environ.setdefault("WANDB_DATA_DIR", str((output_dir / "wandb" / "data").resolve()))

    offline_because = _why_offline(known)
    if offline_because is None and run_id is not None and _not_uploaded(output_dir, run_id):
        # W&B joins the parts of a run correctly only in their order in time; uploaded later, the earlier part would
        # replace this one.
        offline_because = "the run's earlier part is not uploaded yet"
    if offline_because is None:
        try:
            run = _init(wandb, "online", project, run_name, config, output_dir, run_id)
        except Exception as error:  # noqa: BLE001  (whatever wandb raises must not end a training run)
            offline_because = f"the server did not start a run: {_one_line(error)}"
            redact_logs(output_dir / "wandb")  # the logs may hold requests and answers with the key
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


def online_problem() -> str | None:
    """Why a run would be logged offline although the user did not ask for that; None if it would be online.

    No run is started.

    Raises:
        UserError: if W&B cannot be imported or refuses its settings.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in {"1", "true", "yes", "on"}:
        return None
    try:
        from wandb.sdk import wandb_setup
    except ImportError as error:
        raise UserError(f"W&B cannot be imported ({error}): pip install wandb, or turn W&B off") from error
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        settings = wandb_setup.singleton().settings
    except Exception as error:  # an error of pydantic, a UsageError or a ValueError
        raise UserError(f"W&B does not accept its settings: {_one_line(error)}") from error
    return None if settings.mode in {"offline", "dryrun", "disabled"} else _why_offline(settings)


def not_uploaded(run: Any) -> str:
    """What to print if the server did not take everything of a run within the limit."""
    upload = shlex.join(["wandb", "sync", str(Path(run.settings.sync_dir).resolve())])
    return f"wandb: the server did not take the rest of the run within {FINISH_SECONDS:g} s; upload it with: {upload}"


def _not_uploaded(output_dir: Path, run_id: str) -> list[Path]:
    """Folders of a run's offline parts that `wandb sync` has not marked as uploaded, oldest first."""
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
        silent=True,  # start_wandb prints the only line that is needed
        console="off",  # capturing stdout breaks progress bars
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,  # else nobody is told that something is left
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
        allow_val_change=run_id is not None,  # a continued run may have other settings, such as more steps
    )
    # One x axis for all charts. wandb's own step counts log calls, whose number differs after a resume.
    run.define_metric("train/global_step", hidden=True)
    run.define_metric("*", step_metric="train/global_step")
    return run


def _why_offline(settings: Any) -> str | None:
    """Why a run must be offline: set to it, no usable API key, or no connection to the server. None if it need not."""
    if settings.mode in {"offline", "dryrun"}:
        return "WANDB_MODE=offline" if os.environ.get("WANDB_MODE") else "wandb is set to offline"
    try:
        clean_key(os.environ.get(WANDB_VARIABLE), WANDB_VARIABLE)
        if not _credentials_known(settings.base_url):
            return "no API key: set WANDB_API_KEY or run 'wandb login'"
    except Exception as error:  # noqa: BLE001  (a key in a wrong format, an unreadable netrc)
        return f"no usable API key: {_one_line(error)}"
    host, port = address_to_reach(settings.base_url, settings)
    problem = cannot_connect(host, port)
    return f"no connection to {host}:{port}: {problem}" if problem else None


def _credentials_known(base_url: str) -> bool:
    from wandb.sdk.lib import wbauth

    # wandb's own look-up: environment, netrc (also under the host's older names), settings. It does not prompt or
    # connect. Its warning about an unusual netrc is hidden, because one line from us is enough.
    with contextlib.redirect_stderr(io.StringIO()):
        auth = wbauth.authenticate_session(host=base_url, source="start_wandb", prompt=False, update_session=False)
    return auth is not None


def address_to_reach(base_url: str, settings: Any = None) -> tuple[str, int]:
    """Host and port of a server, or of the proxy in front of it. W&B's settings may name their own proxy."""
    url = urllib.parse.urlsplit(base_url)
    host = url.hostname or ""
    proxy = getattr(settings, f"{url.scheme}_proxy", None)
    if not proxy and not urllib.request.proxy_bypass(host):
        proxy = urllib.request.getproxies().get(url.scheme)
    if proxy:
        url = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host = url.hostname or host
    return host, url.port or (443 if url.scheme == "https" else 80)


def cannot_connect(host: str, port: int) -> str | None:
    """Why a TCP connection cannot be made within CONNECT_SECONDS, or None if it can."""
    outcome = ["timed out"]

    def connect() -> None:
        try:
            with socket.create_connection((host, port), timeout=CONNECT_SECONDS):
                outcome[0] = ""
        except (OSError, UnicodeError) as error:
            outcome[0] = getattr(error, "strerror", None) or str(error)

    # In a thread, because a socket's timeout does not limit the look-up of the host name.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return outcome[0] or None


def _plain(value: Any) -> Any:
    """The config in types that W&B can store: text for paths, lists for tuples and sets."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _one_line(error: BaseException) -> str:
    text = redact(" ".join(str(error).split()))
    for advice in (" For further information", " Consider increasing"):  # added by pydantic and wandb
        text = text.split(advice)[0]
    return text[:300] or type(error).__name__
