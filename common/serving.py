"""Asking a server: every setting with its default, what a trained adapter brings along, and the server's command.

Nothing heavy is imported here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from common.args import check_values, setting, url_problem
from common.artifacts import TRAINING_CONFIG, read_adapter_config
from common.errors import UserError, UserErrors
from common.plans import MAX_SUBPROBLEM_CHARS, MAX_SUBPROBLEMS

ADAPTER_NAME = "recursive_reasoner"
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank


@dataclass(kw_only=True)
class ServingArgs:
    """Settings of `inference_vllm.py`. Lengths are tokens, times are seconds."""

    # fmt: off
    base_url: str = setting("http://localhost:8000/v1", "server", "address of the OpenAI-compatible server", metavar="URL")
    model: str | None = setting(None, "server", "base model's name there (default: the entry of /v1/models without a parent)", metavar="NAME")
    lora_adapter: str = setting(ADAPTER_NAME, "server", "planner's name there", metavar="NAME")
    worker_url: str | None = setting(None, "server", "another server for the worker (default: the same)", metavar="URL")
    worker_model: str | None = setting(None, "server", "worker's name there (default: its base model)", metavar="NAME")
    api_key: str | None = field(default=None, repr=False, metadata={"group": "server", "help": "key of the servers; better in $OPENAI_API_KEY, which no process list shows; never printed or stored", "metavar": "KEY"})
    timeout: float = setting(120.0, "server", "one attempt at one request may take this long", positive=True)
    retries: int = setting(2, "server", "further attempts, after pauses that double", minimum=0)
    concurrency: int = setting(32, "server", "requests in flight at once", positive=True)
    probe: bool = setting(True, "server", "check at start that the base model is not answered by the adapter")

    max_tokens: int = setting(512, "planner", "longest plan", positive=True)
    temperature: float = setting(0.7, "planner", "sampling temperature of plans (--benchmark: 0, as in training's scoreboard, unless given); the worker is greedy", minimum=0)
    structured: bool = setting(True, "planner", "ask for plans by JSON schema, where the server takes one")

    training_config: str | None = setting(None, "prompts", "take the settings below from this training_config.json (default: the one in the adapter's folder, where server and folder are on this machine)", metavar="FILE")
    planner_style: Literal["full", "short"] = setting("full", "prompts", "wording the planner was trained with")
    worker_style: Literal["instruct", "worked", "few-shot"] = setting("instruct", "prompts", "wording the worker had in training")
    worker_max_tokens: int = setting(256, "prompts", "longest answer of the worker to one call", positive=True)
    max_subproblems: int = setting(MAX_SUBPROBLEMS, "prompts", "a plan with more is invalid", positive=True)
    max_subproblem_chars: int = setting(MAX_SUBPROBLEM_CHARS, "prompts", "a plan with a longer subproblem is invalid", positive=True)

    dataset: str | None = setting(None, "benchmark", "held-out questions: as in grpo_training.py (default: what the adapter was trained for, else openai/gsm8k)", metavar="SOURCE")
    samples: int = setting(100, "benchmark", "how many", positive=True)
    # fmt: on

    def validate(self) -> None:
        """Raise `UserErrors` with every value that cannot be right."""
        problems = check_values(self)
        for flag, url in (("--base-url", self.base_url), ("--worker-url", self.worker_url)):
            problem = None if url is None else url_problem(url)
            if problem is not None:
                problems.append(f"{flag} {problem}")
        if problems:
            raise UserErrors(problems)


PROMPT_SETTINGS = tuple(
    spec.name for spec in fields(ServingArgs) if spec.metadata["group"] == "prompts" and spec.name != "training_config"
)


def plan_schema(max_subproblems: int, max_subproblem_chars: int) -> dict[str, Any]:
    """JSON schema of a plan. The bounds are the parser's: without them a small untrained model lists without end."""
    part = {"type": "string", "minLength": 1, "maxLength": max_subproblem_chars}
    properties = {
        "should_decompose": {"type": "boolean"},
        "subproblems": {"type": "array", "items": part, "maxItems": max_subproblems},
        "plan": {"type": "string"},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def is_on_this_machine(url: str) -> bool:
    """Whether a server's address is this machine's own, so that paths it tells are ours."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def find_training_config(given: str | None, url: str, adapter_root: str | None) -> Path | None:
    """The training_config.json to go by: the one named, else the served adapter's own if it lies on this machine.

    Raises:
        UserError: when the one named is not there.
    """
    if given is not None:
        path = Path(given)
        if not path.is_file():
            wrong = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"--training-config {given} {wrong}: name the adapter's {TRAINING_CONFIG}")
        return path
    if adapter_root is None or not is_on_this_machine(url):
        return None
    path = Path(adapter_root) / TRAINING_CONFIG
    return path if path.is_file() else None


def read_training_settings(path: Path) -> dict[str, Any]:
    """The settings a training run stored.

    Raises:
        UserError: when the file holds none.
    """
    try:
        settings = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no {TRAINING_CONFIG} of a run ({type(error).__name__}: {error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no {TRAINING_CONFIG} of a run: its settings are no object")
    return settings


def with_trained(given: Mapping[str, Any], trained: Mapping[str, Any]) -> ServingArgs:
    """Defaults, then what the adapter was trained with, then explicit flags."""
    brought = {name: trained[name] for name in PROMPT_SETTINGS if trained.get(name) is not None}
    return ServingArgs(**{**brought, **given})


def server_command(
    base: str, adapter: Path | str, *, port: int = 8000, cpu: bool, chat_template: str | None = None
) -> list[str]:
    """The arguments of `python` that serve an adapter and its base with vLLM.

    A slot more than there are adapters, because vLLM's CPU backend otherwise answers base requests with the
    adapter (DESIGN §5); the rank from the adapter's config, rounded up to one that vLLM takes.

    Args:
        base: Hub id or folder of the base model.
        adapter: its folder.
        cpu: whether there is no GPU: single precision, little memory, this machine only.
        chat_template: file with one, for base models that bring none.

    Raises:
        UserError: when the folder holds no LoRA adapter, or one of too high a rank.
    """
    config = read_adapter_config(str(adapter), "--lora-modules")
    # With rank_pattern some layers may have a higher rank than `r`.
    needed = max([config["r"], *config.get("rank_pattern", {}).values()])
    rank = next((rank for rank in _LORA_RANKS if rank >= needed), None)
    if rank is None:
        raise UserError(f"{adapter} has LoRA rank {needed}, vLLM serves up to {_LORA_RANKS[-1]}: train a smaller one")
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", base, "--enable-lora"]
    command += ["--max-lora-rank", str(rank), "--max-loras", "2"]
    if cpu:
        command += ["--max-cpu-loras", "2", "--dtype", "float32", "--host", "127.0.0.1"]
    if chat_template is not None:
        command += ["--chat-template", chat_template]
    return [*command, "--lora-modules", f"{ADAPTER_NAME}={adapter}", "--port", str(port)]


def shown_command(command: list[str]) -> str:
    """A command as text to paste into a shell."""
    return shlex.join(["python", *command])
