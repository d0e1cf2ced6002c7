"""What both training scripts, and `--check`, look at before anything is loaded: base model and adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
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
    config = base_config(args.base_model)
    if args.adapter_path is None:
        layers = (config.get("text_config") or config).get("num_hidden_layers")
        if isinstance(layers, int):
            first_adapted(args, layers)
        return args
    check_adapter_base(args.adapter_path, args.base_model)
    check_adds_to_base(args.adapter_path)
    if not isinstance(args, SupervisedArgs) or args.format == "json-plan":  # planning data bring their own prompts
        tell_other_family(check_adapter_prompts(args.adapter_path, args.planner_prompt()), args.dataset)
    args = with_adapters_lora(args, given)
    args.validate()
    return args


def base_config(base_model: str) -> dict[str, Any]:
    """The config of a base model in a folder, {} of one that is not; read before transformers is imported.

    Raises:
        UserError: if the folder's config or its tokenizer's files cannot be read, or it holds no weights.
    """
    folder = Path(unconverted(base_model)[0]).expanduser()
    if not folder.is_dir():
        return {}
    again = "copy or save the model again"
    found: dict[str, Any] = {}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        try:
            found[name] = json.loads((folder / name).read_text(encoding="utf-8"))
            if not isinstance(found[name], dict):
                raise ValueError("it is no object")
            if name == "config.json" and not isinstance(found[name].get("text_config") or {}, dict):
                raise ValueError("its text_config is no object")
        except FileNotFoundError:
            continue  # a packaged GGUF file holds its config, and some tokenizers are stored in other files
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"--base-model {base_model}: its {name} cannot be read ({error}): {again}") from error
    if "config.json" not in found:
        return {}
    if not any(any(folder.glob(f"*.{kind}")) for kind in ("safetensors", "bin", "gguf")):
        raise UserError(f"--base-model {base_model} holds no weights (*.safetensors): {again}")
    return dict(found["config.json"])
