"""Flags that change nothing unless another setting goes with them: one table for each training script.

A flag that is ignored misleads its user. Only flags that were given are checked, and only with values other than their
defaults: the defaults themselves need no partner. Settings that one turns off and on again for a trial, such as the
names of a W&B run beside --no-wandb, are not in the tables. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from common.errors import UserErrors
from common.settings.fields import flag_of
from common.settings.grpo import TrainingArgs
from common.settings.sft import SupervisedArgs


@dataclass(frozen=True, slots=True)
class Rule:
    """When some settings are used.

    Attributes:
        names: of the settings.
        used: tells it from all settings of the run, and from the kinds of its data (`questions.kinds_of`).
        otherwise: why they are not used if that says no, for the user: "--flag value changes nothing …".
        remedy: what to do then.
    """

    names: tuple[str, ...]
    used: Callable[[Any, Collection[str]], bool]
    otherwise: str
    remedy: str = "leave it out"


_ADD = "add that, or leave {flag} out"


def _asks_server(args: TrainingArgs) -> bool:
    return args.worker_url is not None or args.samples_from_servers()


_HUB_CONFIG = Rule(
    ("dataset_config",),
    lambda args, kinds: "hub" in kinds,
    "for generated problems or files, which have no configurations",
)
GRPO_RULES = (
    Rule(
        ("dataset_split",),
        lambda args, kinds: bool({"hub", "folder"} & set(kinds)),
        "for generated problems or a single file, which have no splits",
    ),
    _HUB_CONFIG,
    Rule(("eval_dataset",), lambda args, kinds: args.eval_samples > 0, "without --eval-samples", _ADD),
    Rule(
        ("worker_model",),
        lambda args, kinds: _asks_server(args),
        "without a server",
        "add its --worker-url, or leave {flag} out",
    ),
    Rule(
        ("worker_timeout",),
        lambda args, kinds: args.worker_url is not None,
        "without --worker-url (for --vllm-url there is --vllm-timeout)",
        _ADD,
    ),
    Rule(
        ("worker_batch_tokens",),
        lambda args, kinds: not _asks_server(args),
        "for a worker on a server, which makes its batches itself",
    ),
    Rule(
        ("vllm_port", "vllm_gpu_memory"),
        lambda args, kinds: args.vllm_python is not None,
        "without --vllm-python, whose server it is for",
        _ADD,
    ),
    Rule(
        ("vllm_adapter_dir", "vllm_timeout", "vllm_patience", "vllm_max_gap"),
        lambda args, kinds: args.samples_from_servers(),
        "without --vllm-url or --vllm-python",
        _ADD,
    ),
)
SFT_RULES = (
    _HUB_CONFIG,
    Rule(
        ("planner_style", "worker_context"),
        lambda args, kinds: args.format == "json-plan",
        "without --format json-plan, because planning data bring their own prompts",
        _ADD,
    ),
)


def check_partners(
    args: TrainingArgs | SupervisedArgs, given: Mapping[str, Any], rules: Sequence[Rule], kinds: Collection[str]
) -> None:
    """Refuse flags that would be ignored.

    Args:
        args: all settings of the run.
        given: those from the command line.
        rules: of the script.
        kinds: of the run's data (`questions.kinds_of`).

    Raises:
        UserErrors: with a line for each such flag.
    """
    defaults = {spec.name: spec.default for spec in fields(args)}
    ignored = []
    for rule in rules:
        for name in rule.names:
            value, flag = given.get(name, defaults[name]), flag_of(name)
            if value != defaults[name] and not rule.used(args, kinds):
                shown = f"{value:g}" if isinstance(value, float) else value
                remedy = rule.remedy.format(flag=flag)
                ignored.append(f"{flag} {shown} changes nothing {rule.otherwise}: {remedy}")
    if ignored:
        raise UserErrors(ignored)
