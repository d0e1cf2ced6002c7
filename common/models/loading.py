"""Load models, tokenizers and encoders by name: packaged, Hub id or folder."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.models.packaged import packaged_encoder, resolve_model
from common.models.precision import has_native_bf16
from common.prompts import PLAIN_CHAT_TEMPLATE
from common.settings.grpo import PACKAGED_MODEL
from common.settings.secrets import first_line, hub_token


def quiet_transformers() -> None:
    """Turn off progress bars and warnings of transformers, and of libraries that it loads, on the terminal."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before transformers imports it: it misses kernels aloud
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def load_tokenizer(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """Load the tokenizer of a model. It pads on the left, and always has a pad token and a chat template.

    Args:
        name: Hub id, folder, or the packaged model.
        revision: of a Hub model (default: its main branch).
        gguf_file: name of the GGUF file that contains the tokenizer, if there is one.

    Raises:
        UserError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name),
            revision=revision,
            padding_side="left",
            truncation_side="left",
            **({} if gguf_file is None else {"gguf_file": gguf_file}),
            trust_remote_code=False,  # if unset, transformers asks the user, and runs the model's code after a "y"
        )
        _check_savable(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return tokenizer


def _check_savable(tokenizer: Any) -> None:
    """Refuse a tokenizer that can be loaded but not saved: the run would fail at its first checkpoint.

    Raises:
        ValueError: if the name of a chat template is a path, or a text cannot be encoded as UTF-8.
    """
    templates = tokenizer.chat_template
    for name in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise ValueError(f"a chat template is named {name!r:.60}, which is no file name")
    # All that its config holds is saved again, also settings that are unknown here.
    saved = [templates, tokenizer.special_tokens_map, tokenizer.init_kwargs]
    json.dumps(saved, ensure_ascii=False, default=str).encode()


def load_base(
    name: str,
    *,
    four_bit: bool,
    dtype: Any = None,
    revision: str | None = None,
    gpu: bool | None = None,
    cpu_dtype: str = "float32",
) -> Any:
    """Load the base model: in 4-bit NF4 with double quantisation, in bf16 or fp16 on a GPU, or in fp32 on a CPU.

    NF4 is the 4-bit number format of QLoRA (arXiv:2305.14314).

    Args:
        name: Hub id, folder, or the packaged model.
        four_bit: whether to quantise.
        dtype: of the weights that are not quantised, instead of the default above.
        revision: of a Hub model (default: its main branch).
        gpu: whether to use a GPU (default: if there is one).
        cpu_dtype: "bfloat16" if all products will be in bf16 on a CPU. Linear layers are then stored in bf16.

    Raises:
        UserError: if it cannot be loaded; the message says what to try.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from common.decoding.packing import store_in_bf16

    gpu = torch.cuda.is_available() if gpu is None else gpu
    half = torch.bfloat16 if has_native_bf16() else torch.float16
    dtype = dtype or (half if gpu else torch.float32)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": False}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if gpu:
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    with explained(name):
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), **options)
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a layer permanently at its first forward in eval mode, for a
        # kernel without a gradient. After one worker call, training would continue with wrong gradients and no error.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if cpu_dtype == "bfloat16" and not gpu and not four_bit:
        store_in_bf16(model)
    return model


def load_sentence_encoder(name: str) -> Any:
    """Load a sentence-transformers model on the CPU. If a package with the same weights is installed, that is used.

    Raises:
        UserError: if it cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    packaged = packaged_encoder(name)
    if packaged is not None:
        return SentenceTransformer(str(packaged), device="cpu")
    with explained(name):
        return SentenceTransformer(name, device="cpu")


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Context manager: turn errors while loading model `name` into one line that says what to do.

    Raises:
        UserError: if memory, a file, a package or the network is missing, or if the Hub token is not valid.
    """
    import torch

    _check_hub_token(name)
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"no memory for model {name!r} ({first_line(error)}): use 4-bit weights (leave out --no-4bit), a "
            "smaller --base-model, or a device with more memory",
            exit_code=1,
        ) from error
    except UserError:
        raise
    except Exception as error:  # after reading a damaged config, libraries raise errors of any type
        hint = (
            "check the name, the network, and access to a gated model (HF_TOKEN or `hf auth login`); without network "
            f"use a local folder, or --base-model {PACKAGED_MODEL}"
        )
        if Path(name).exists():
            hint = "the folder must hold a Hugging Face model with its tokenizer"
        raise UserError(f"model {name!r} could not be loaded ({first_line(error)}): {hint}", exit_code=1) from error


def check_base_model(base_model: str) -> None:
    """Check the value of --base-model without network: an existing folder, a Hub id, or the packaged model.

    Raises:
        UserError: if it is none of these; the message says what was found.
    """
    folder = Path(base_model).expanduser()
    if not base_model.strip():
        raise UserError("--base-model is empty: name a Hub id or a folder")
    if base_model.startswith("packaged/") and base_model != PACKAGED_MODEL:
        raise UserError(f"--base-model {base_model} is not packaged: {PACKAGED_MODEL} is")
    if folder.is_file():
        raise UserError(f"--base-model {base_model} is a file: name the folder of a Hugging Face model")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"--base-model {base_model} holds no config.json: name the folder of a Hugging Face model")
    if not folder.exists() and (base_model.startswith((".", "/", "~")) or base_model.count("/") > 1):
        raise UserError(f"--base-model {base_model} does not exist: name a folder or a Hub id (owner/name)")
    _check_hub_token(base_model)


def _check_hub_token(name: str) -> None:
    """Check the Hub token's form before a library sends it. Only a model on the Hub needs a token."""
    if name != PACKAGED_MODEL and not Path(name).expanduser().exists():
        hub_token()
