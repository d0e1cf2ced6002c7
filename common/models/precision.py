"""Number formats for weights and for matrix products on this device: 4 bits, bf16, fp16 or fp32."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from common.errors import UserError


class LoraSettings(Protocol):
    """Settings of model and adapter that every training script has. `common.settings` documents each of them."""

    adapter_path: str | None
    use_4bit: bool | None
    cpu_dtype: Literal["auto", "float32", "bfloat16"]
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_layers: int | None

    def samples_from_servers(self) -> bool:
        """Whether vLLM servers sample the completions that are trained on."""


def use_4bit(args: LoraSettings) -> bool:
    """Whether to quantise to 4 bits: the setting, or by default only on a GPU."""
    import torch

    return torch.cuda.is_available() if args.use_4bit is None else args.use_4bit


def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products, and torch uses them (for a GPU: `has_native_bf16`)."""
    import torch

    has = torch.cpu.get_capabilities()
    # Without such instructions oneDNN converts every number, which is slower than fp32. `is_available` says whether
    # torch was built with oneDNN. The last check says whether this processor and system can use it.
    return (
        bool(has.get("avx512_bf16") or has.get("amx_bf16"))
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def cpu_dtype(args: LoraSettings) -> Literal["auto", "float32", "bfloat16"]:
    """The dtype of matrix products on this CPU. With a GPU the setting is returned unchanged, because it is not used.

    Raises:
        UserError: if bfloat16 is set, but this machine or these weights do not support it.
    """
    import torch

    if torch.cuda.is_available() or args.cpu_dtype == "float32":
        return args.cpu_dtype
    if args.cpu_dtype == "auto" and args.samples_from_servers():
        return "float32"  # the policy check (`PolicyCheck`) has its strictest limit in fp32
    four_bit, native = use_4bit(args), multiplies_bf16()
    if args.cpu_dtype == "bfloat16" and four_bit:
        raise UserError("--cpu-dtype bfloat16 is for weights that are not quantised: leave out --4bit")
    if args.cpu_dtype == "bfloat16" and not native:
        raise UserError(
            "--cpu-dtype bfloat16: this processor has no instructions for it (AVX512-BF16 or AMX), which makes it "
            "slower than fp32: use --cpu-dtype float32, or resume on the machine where the run began"
        )
    return "bfloat16" if native and not four_bit else "float32"


def quantised_on(model: Any) -> str:
    """The device that a 4-bit model was quantised on. CPU and GPU kernels may round differently, so it matters."""
    import torch

    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def train_in_fp32(model: Any) -> None:
    """Convert every trainable parameter to fp32. Call it before the optimiser is created.

    TRL casts the LoRA weights of a quantised base model to bf16. With usual learning rates, Adam's updates are then
    smaller than half the distance between neighbouring bf16 numbers, so most entries never change
    (docs/architecture.md). A resumed run would also differ from an uninterrupted one, because PEFT loads adapters in
    fp32.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def has_native_bf16() -> bool:
    """Whether there is a GPU with bf16 instructions. Older ones (T4, V100) emulate bf16 slowly, so they use fp16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
