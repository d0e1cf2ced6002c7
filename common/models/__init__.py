"""Load models, tokenizers and encoders by name (packaged, Hub id or folder), with quantisation and LoRA."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from common.errors import UserError
from common.models.packaged import cache_dir as cache_dir
from common.models.packaged import packaged_encoder as packaged_encoder
from common.models.packaged import resolve_model as resolve_model
from common.models.packaged import unconverted as unconverted
from common.prompts import PLAIN_CHAT_TEMPLATE
from common.settings.grpo import PACKAGED_MODEL
from common.settings.secrets import hub_token, redact


class LoraSettings(Protocol):
    """Settings of model and adapter that every training script has; `common.settings` documents each."""

    adapter_path: str | None
    use_4bit: bool | None
    cpu_dtype: Literal["auto", "float32", "bfloat16"]
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_layers: int | None


def quiet_transformers() -> None:
    """Turn off progress bars and warnings of transformers on the terminal."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def use_4bit(args: LoraSettings) -> bool:
    """Whether to quantise to 4 bits: the setting, or by default only on a GPU."""
    import torch

    return torch.cuda.is_available() if args.use_4bit is None else args.use_4bit


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for bf16 products, and torch uses them."""
    import torch

    has = torch.cpu.get_capabilities()
    # Without such instructions oneDNN converts every number, which is slower than fp32. `is_available` tells what
    # torch was built with; the last check tells whether this processor and system may use it.
    return (
        bool(has.get("avx512_bf16") or has.get("amx_bf16"))
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def cpu_dtype(args: LoraSettings) -> Literal["auto", "float32", "bfloat16"]:
    """The dtype of matrix products on this CPU. With a GPU it is the setting unchanged, because nothing reads it.

    Raises:
        UserError: if bfloat16 is asked for but this machine or these weights do not support it.
    """
    import torch

    if torch.cuda.is_available() or args.cpu_dtype == "float32":
        return args.cpu_dtype
    four_bit, native = use_4bit(args), multiplies_bf16()
    if args.cpu_dtype == "bfloat16" and four_bit:
        raise UserError("--cpu-dtype bfloat16 is for weights that are not quantised: leave out --4bit")
    if args.cpu_dtype == "bfloat16" and not native:
        raise UserError(
            "--cpu-dtype bfloat16: this processor has no instructions for it (AVX512-BF16 or AMX), which makes it "
            "slower than fp32: use --cpu-dtype float32, or go on where the run began"
        )
    return "bfloat16" if native and not four_bit else "float32"


def load_tokenizer(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model, padding on the left, with a pad token and a chat template.

    Raises:
        UserError: where it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name),
            revision=revision,
            padding_side="left",
            truncation_side="left",
            **({} if gguf_file is None else {"gguf_file": gguf_file}),
            trust_remote_code=False,  # left open, transformers asks on the terminal, and runs it at a "y"
        )
        _check_savable(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return tokenizer


def _check_savable(tokenizer: Any) -> None:
    """Stop for a tokenizer that can be loaded but not saved, which would end a run at its first checkpoint.

    Raises:
        ValueError: for a chat template whose name would be a path, and for texts that UTF-8 cannot hold.
    """
    templates = tokenizer.chat_template
    for name in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise ValueError(f"a chat template is named {name!r:.60}, which is no file name")
    json.dumps([templates, tokenizer.special_tokens_map], ensure_ascii=False, default=str).encode()


def load_base(
    name: str, *, four_bit: bool, dtype: Any = None, revision: str | None = None, gpu: bool | None = None
) -> Any:
    """Load the base model: 4-bit NF4 with double quantisation, or else bf16 or fp16 on a GPU and fp32 on a CPU.

    NF4 is the 4-bit number format of QLoRA (arXiv:2305.14314). On a CPU the weights stay fp32 even if products are
    computed in bf16 (`cpu_dtype`): only the copies made for generation are bf16.

    Args:
        name: Hub id, folder, or the packaged model.
        four_bit: whether to quantise.
        dtype: of the weights that are not quantised, instead of the default above.
        revision: of a Hub model (default: its main branch).
        gpu: whether to use a GPU (default: if there is one).

    Raises:
        UserError: if it cannot be loaded; the message names ways out.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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
        # kernel without a gradient. After one worker call, training would silently go on with wrong gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def quantised_on(model: Any) -> str:
    """The device that a 4-bit model was quantised on. CPU and GPU kernels may round differently, so it matters."""
    import torch

    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def lora_config(args: LoraSettings, model: Any) -> Any:
    """The `peft.LoraConfig`: that of `adapter_path`, or else all attention and MLP projections of the adapted layers.

    LoRA (arXiv:2106.09685) adds (lora_alpha / lora_r) · B A to each weight.
    """
    from peft import LoraConfig, PeftConfig

    if args.adapter_path is not None:
        with explained(args.adapter_path):
            config = PeftConfig.from_pretrained(args.adapter_path)
        config.inference_mode = False
        return config
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in LORA_TARGET_MODULES if name in leaves]
    layers = None
    if args.lora_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        layers = list(range(max(0, count - args.lora_layers), count))
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        # Models with fused or differently named projections (Phi, GPT-NeoX): let PEFT find the linear layers.
        target_modules=targets or "all-linear",
        layers_to_transform=layers,
        bias="none",
        task_type="CAUSAL_LM",
    )


def load_adapter_weights(model: Any, adapter_path: str) -> None:
    """Load the weights of an adapter folder into a `PeftModel` with the same LoRA settings.

    Raises:
        UserError: if they do not fit the model.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        result: Any = set_peft_model_state_dict(model, load_peft_weights(adapter_path, device="cpu"))
    except (RuntimeError, ValueError, OSError) as error:
        remedy = (
            "the adapter has embeddings of its own, as for added tokens: merge it with merge_and_push.py --no-push, "
            "and name the merged model with --base-model"
            if "embed_tokens" in str(error)
            else "name the base model that the adapter was trained on"
        )
        raise UserError(
            f"--adapter-path {adapter_path} does not fit --base-model: {first_line(error)}: {remedy}"
        ) from error
    if result.unexpected_keys:
        raise UserError(
            f"--adapter-path {adapter_path} has weights that the base model lacks, such as "
            f"{result.unexpected_keys[0]}: name the base model that the adapter was trained on"
        )


def train_in_fp32(model: Any) -> None:
    """Convert every trainable parameter to fp32. Call it before the optimiser is created.

    TRL casts the LoRA weights of a quantised base model to bf16. With usual learning rates, Adam's updates are then
    smaller than half the distance of two bf16 numbers, so most entries never change (docs/architecture.md). A resumed
    run would also differ from an uninterrupted one, because PEFT loads adapters in fp32.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def add_reference_adapter(model: Any) -> None:
    """Keep a frozen copy of the adapter's present weights, named "ref": the reference policy of TRL's KL penalty.

    Without it, TRL uses the base model as reference, and the penalty would pull a warm-started policy back to the
    base model.
    """
    import torch

    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.copy_(model.get_parameter(name.replace(".ref.", ".default.")))
    model.set_adapter("default")


def has_native_bf16() -> bool:
    """Whether the GPU has bf16 instructions. Older ones (T4, V100) emulate bf16 slowly, so they use fp16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def load_sentence_encoder(name: str) -> Any:
    """Load a sentence-transformers model on the CPU; the installed package with the same weights is preferred.

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
        UserError: for missing memory, files, packages or network, and for a Hub token that is not valid.
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
    except Exception as error:  # a config may hold anything, and libraries raise anything then
        reason = first_line(error)
        hint = "check the name, the network, and access to a gated model (HF_TOKEN or `hf auth login`)"
        if Path(name).exists():
            hint = "the folder must hold a Hugging Face model with its tokenizer"
        raise UserError(
            f"model {name!r} could not be loaded ({reason}): {hint}; without network use a local folder, or "
            f"--base-model {PACKAGED_MODEL}",
            exit_code=1,
        ) from error


def first_line(error: BaseException) -> str:
    """An exception in one line: its type and the first 160 characters of its message, without secrets."""
    lines = redact(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def check_base_model(base_model: str) -> None:
    """Check the value of --base-model without network: an existing folder, a Hub id, or the packaged model.

    Raises:
        UserError: if it can be none of these; the message says what was found.
    """
    folder = Path(base_model).expanduser()
    if not base_model.strip():
        raise UserError("--base-model is empty: name a Hub id or a folder")
    if base_model.startswith("packaged/") and base_model != PACKAGED_MODEL:
        raise UserError(f"--base-model {base_model} is not packaged: {PACKAGED_MODEL} is")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"--base-model {base_model} holds no config.json: name the folder of a Hugging Face model")
    if not folder.exists() and (base_model.startswith((".", "/", "~")) or base_model.count("/") > 1):
        raise UserError(f"--base-model {base_model} does not exist: name a folder or a Hub id (owner/name)")
    _check_hub_token(base_model)


def _check_hub_token(name: str) -> None:
    """Check the Hub token's form before a library sends it. Only a model on the Hub needs a token."""
    if name != PACKAGED_MODEL and not Path(name).expanduser().exists():
        hub_token()
