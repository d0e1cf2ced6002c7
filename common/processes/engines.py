"""Check the engine that accelerate was told to use. Engines that split the weights between processes are refused.

The engine is read from environment variables, before torch is loaded. `accelerate launch` sets them from its flags and
its configuration file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.errors import UserError

_WHOLE = "worker, adapter files and --vllm-url's versions need all weights in one process"


def check_engine() -> None:
    """Refuse an engine under which no process holds all weights.

    Raises:
        UserError: if such an engine is set, or its ZeRO stage cannot be read; the message says what to use instead.
    """
    found = _sharding_engine()
    if found is not None:
        raise UserError(
            f"accelerate is set to {found}, under which no process holds the whole weights, while {_WHOLE}: use "
            "DeepSpeed ZeRO-2 (zero_stage: 2) or plain torchrun, also with --vllm-url"
        )


def _sharding_engine() -> str | None:
    if _is_set("ACCELERATE_USE_FSDP"):
        return "FSDP"
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        return "Megatron-LM"
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return "parallelism within a model (parallelism_config)"
    return "DeepSpeed ZeRO-3" if _is_set("ACCELERATE_USE_DEEPSPEED") and _zero_stage() == 3 else None


def _zero_stage() -> int:
    """The ZeRO stage, found as accelerate finds it: in DeepSpeed's configuration file, in accelerate's, or else 2."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.casefold() != "none":  # accelerate also writes "None"
        try:
            stage = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"DeepSpeed's configuration {file} names no zero_optimization.stage ({type(error).__name__}: {error}): "
                "set it to 2"
            ) from error
    else:
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    try:
        return int(stage)
    except (TypeError, ValueError):
        raise UserError(f"DeepSpeed's zero stage is {stage!r}: set it to 2") from None


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").casefold() in ("1", "true", "yes", "on", "y", "t")
