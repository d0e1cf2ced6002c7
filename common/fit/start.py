"""What both training scripts, and `--check`, look at before anything is loaded: base model and adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.models import check_base_model, first_adapted, unconverted
from common.problems.questions import tell_other_family
from common.runs.adapters import A, check_adapter_base, check_adapter_prompts, check_adds_to_base, with_adapters_lora
from common.settings.sft import SupervisedArgs


def check_models(args: A, given: Mapping[str, Any]) -> A:
    """Check the base model's name and the adapter that a run starts from.

    Args:
        args: settings of the run.
        given: those from the command line.

    Returns:
        The settings, with the adapter's own rank, scale, dropout and layers.

    Raises:
        UserError: if one of them cannot be used.
    """
    check_base_model(args.base_model)
    if args.adapter_path is None:
        layers = _layers(args.base_model)
        if layers is not None:
            first_adapted(args, layers)
        return args
    check_adapter_base(args.adapter_path, args.base_model)
    check_adds_to_base(args.adapter_path)
    if not isinstance(args, SupervisedArgs) or args.format == "json-plan":  # planning data bring their own prompts
        tell_other_family(check_adapter_prompts(args.adapter_path, args.planner_prompt()), args.dataset)
    args = with_adapters_lora(args, given)
    args.validate()
    return args


def _layers(base_model: str) -> int | None:
    """Number of layers of a base model in a folder; None if that cannot be told before transformers is imported."""
    try:
        config = json.loads(Path(unconverted(base_model)[0], "config.json").expanduser().read_text(encoding="utf-8"))
        layers = config.get("text_config", config)["num_hidden_layers"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None  # a damaged config is explained when the model is loaded
    return layers if isinstance(layers, int) else None
