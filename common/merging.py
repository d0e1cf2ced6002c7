"""An adapter merged into its base model, in one model's worth of memory, and certified from what is on disk."""

from __future__ import annotations

import gc
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from common import artifacts, models
from common import certificate as certifying
from common.cli import say
from common.errors import UserError

# What a 4-bit forward needs beside the weights, and what other programs took since: a GPU fuller than this is left.
GPU_HEADROOM = 1.3
BESIDE_WEIGHTS = 32_000_000  # bytes for tokenizer, configs, report and card


@dataclass(frozen=True)
class Job:
    """A merge that passed every check that needs no weights.

    `base` is what to load; `four_bit` says whether the adapter goes onto the dequantised NF4 weights;
    `dtype` and `size` (bytes) are the result's; `load_dtype` is the wider one of result and base checkpoint;
    `inputs` identifies everything that the result depends on.
    """

    base: str
    revision: str | None
    adapter: Path
    target: Path
    four_bit: bool
    dtype: torch.dtype
    load_dtype: torch.dtype
    max_shard_size: str
    planner_style: str
    tokenizer: Any
    size: int
    inputs: dict[str, Any]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def prepare(args: Any, base: str, record: dict[str, Any], inputs: dict[str, Any]) -> Job:
    """Check what needs the libraries but no weights: base, fit of the adapter, tokenizer, free disk.

    Args:
        args: `merge_and_push.MergeArgs`.
        base: name of the base model.
        record: of the adapter's training, {} without one.
        inputs: of `common.certificate.merge_inputs`.

    Raises:
        UserError: with the first thing that is wrong.
    """
    adapter, revision = Path(args.adapter_path), args.revision
    with models.explained(base):
        config = AutoConfig.from_pretrained(models.resolve_model(base), revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "an unknown method")
        raise UserError(
            f"the weights of {base} are stored quantised ({method}), and merging into them would round the update "
            "away: name the unquantised model with --base-model"
        )
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    chosen: torch.dtype = stored if args.dtype == "auto" else getattr(torch, args.dtype)
    parameters = check_fit(config, adapter, base)
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = models.load_tokenizer(
        str(adapter) if own_tokenizer else base, revision=None if own_tokenizer else revision
    )
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {adapter if own_tokenizer else base} has {len(tokenizer)} tokens, the base model "
            f"embeds {rows}: use the tokenizer that belongs to {base}"
        )
    size = parameters * chosen.itemsize
    check_free_disk(args.target, size)
    return Job(
        base=base,
        revision=revision,
        adapter=adapter,
        target=args.target,
        four_bit=inputs["merge_base"] == "nf4",
        dtype=chosen,
        load_dtype=torch.promote_types(stored, chosen),
        max_shard_size=args.max_shard_size,
        planner_style=record.get("settings", {}).get("planner_style", "full"),
        tokenizer=tokenizer,
        size=size,
        inputs=inputs,
    )


def check_fit(config: Any, adapter: Path, base: str) -> int:
    """Compare the adapter's tensors with those PEFT expects on this base, by name and shape, without any weights.

    Returns:
        the number of the base model's parameters.

    Raises:
        UserError: for another base, a wrong rank, missing, unknown or damaged tensors.
    """
    path = adapter / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            broken = next((n for n in found if not torch.isfinite(tensors.get_tensor(n)).all()), None)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({models.first_line(error)}): save the adapter anew") from error
    if broken is not None:
        raise UserError(f"{path} is damaged: {broken} holds NaN or infinite values: save the adapter anew")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in empty.parameters())
    remedy = "name the base model that the adapter was trained on with --base-model"
    try:
        settings = PeftConfig.from_pretrained(str(adapter))
        wrapped = get_peft_model(empty, settings, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the adapter in {adapter} does not fit {base} ({models.first_line(error)}): {remedy}"
        ) from error
    expected = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(wrapped).items()}
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            raise UserError(
                f"the adapter in {adapter} does not fit {base}: {name} has shape {found[name]}, {expected[name]} is "
                f"needed: {remedy}"
            )
    for names, what in ((expected.keys() - found.keys(), "lacks"), (found.keys() - expected.keys(), "has")):
        if names:
            example = min(names)
            raise UserError(
                f"the adapter in {adapter} does not fit {base}: it {what} {len(names)} tensors "
                f"{'that its config promises' if what == 'lacks' else 'that the base has no place for'}, such as "
                f"{example}: {remedy}, or save the adapter anew"
            )
    return count


def check_free_disk(target: Path, size: int) -> None:
    """Stop when the result has no room.

    Raises:
        UserError: with how much is missing.
    """
    existing = artifacts.check_writable(target, "--local-save-path")
    free = shutil.disk_usage(existing).free
    needed = size + BESIDE_WEIGHTS
    if free < needed:
        raise UserError(
            f"the merged model needs {megabytes(needed)}, {existing} has {megabytes(free)} free: "
            f"{megabytes(needed - free)} are missing: free them, or name another disk with --local-save-path"
        )


def megabytes(size: int) -> str:
    """A size in bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def merge(job: Job) -> dict[str, Any]:
    """Merge, save, reload and certify; the folder appears at `job.target` whole or not at all.

    One model is in memory at a time: adapter on base, which becomes the merged one layer by layer, then the
    merged one read back from disk.

    Returns:
        the report, which is saved beside the model.

    Raises:
        UserError: for memory or disk that runs out, and weights that come out as NaN.
    """
    started = time.perf_counter()
    job.target.parent.mkdir(parents=True, exist_ok=True)
    gpu = fits_gpu(job.size)
    with _explained_failures(job), tempfile.TemporaryDirectory(dir=job.target.parent, prefix=".merging-") as temporary:
        folder = Path(temporary) / "model"
        asked = certifying.planner_prompts(job.tokenizer, job.planner_style)
        say(f"adapter on base, on the {'GPU' if gpu else 'CPU'}: {len(asked)} plans to compare with")
        model, reference, base_logits = measure_adapter(job, asked, gpu=gpu)
        say(f"merging, into {dtype_name(job.dtype)}")
        kept, plain = merge_weights(model, job.dtype)
        save(plain, job, folder)
        del model, plain
        free_memory()
        say("merged model, loaded back from disk: the same plans")
        merged = measure_merged(job, folder, asked, reference, gpu=gpu)
        found = certifying.certify(
            job.tokenizer, reference, base_logits, merged, update_kept=kept, dtype=dtype_name(job.dtype)
        )
        report = {
            "inputs": job.inputs,
            "certificate": found.to_dict(),
            "model_bytes": job.size,
            "peak_memory_bytes": peak_memory(),
            "seconds": round(time.perf_counter() - started, 1),
            "versions": artifacts.run_record({})["versions"],
            "files": certifying.file_hashes(folder),
        }
        artifacts.write_json(folder / certifying.REPORT, report)
        replace_folder(folder, job.target)
    return report


def measure_adapter(
    job: Job, asked: list[list[int]], *, gpu: bool
) -> tuple[PeftModel, certifying.Evidence, list[torch.Tensor]]:
    """Adapter on base: the model ready to be merged, its evidence, and the base's own logits on the same plans."""
    base = models.load_base(
        job.base,
        four_bit=job.four_bit,
        dtype=None if job.four_bit else job.load_dtype,  # the dtype that 4-bit training computes in
        revision=job.revision,
        gpu=gpu,
    )
    model = PeftModel.from_pretrained(base, str(job.adapter))
    plans = certifying.write_plans(model, job.tokenizer, asked, adapter=True)
    reference = certifying.Evidence(plans, certifying.predictions(model, asked, plans, adapter=True))
    base_logits = certifying.predictions(model, asked, plans, adapter=False)
    if job.four_bit:
        # PEFT would round the merged weights to 4 bits again, which loses a small update: dequantise first.
        plain = model.unload().dequantize(dtype=job.load_dtype)
        model = PeftModel.from_pretrained(plain, str(job.adapter))
    return model, reference, base_logits


def measure_merged(
    job: Job, folder: Path, asked: list[list[int]], reference: certifying.Evidence, *, gpu: bool
) -> certifying.Evidence:
    """The merged model's own plans, and its logits on the reference's plans, with the weights read from disk."""
    with models.explained(str(folder)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cuda" if gpu else None)
    return certifying.Evidence(
        ids=certifying.write_plans(model, job.tokenizer, asked, adapter=False),
        logits=certifying.predictions(model, asked, reference.ids, adapter=False),
    )


def merge_weights(model: PeftModel, dtype: torch.dtype) -> tuple[float | None, Any]:
    """Merge an adapter layer by layer, each in fp32 and rounded once.

    PEFT's own arithmetic, so every variant of LoRA it knows; but in a 16-bit model it would round the update
    first and the sum again.

    Returns:
        (share of the update that the rounded weights hold, the plain model). The share is the projection
        ⟨round(W + Δ) − round(W), Δ⟩ / |Δ|² over all layers; None where Δ is 0 everywhere.

    Raises:
        ValueError: for a layer that comes out with NaN or infinite weights.
    """
    held = total = 0.0
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer = module.get_base_layer()
        before = {key: value.detach().clone() for key, value in layer.named_parameters(recurse=False)}
        layer.to(torch.float32)
        module.merge(safe_merge=True)
        exact = {key: value.detach().clone() for key, value in layer.named_parameters(recurse=False)}
        layer.to(dtype)
        for key, value in layer.named_parameters(recurse=False):
            if not torch.isfinite(value).all():
                raise ValueError(f"{name}.{key} is not finite in {dtype_name(dtype)}")
            update = exact[key] - before[key].float()
            saved = value.detach().float() - before[key].to(dtype).float()
            held += float((saved * update).sum(dtype=torch.float64))
            total += float(update.square().sum(dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "already merged": by the loop above
        plain: Any = model.merge_and_unload()
    return (held / total if total else None), plain.to(dtype)


def save(plain: Any, job: Job, folder: Path) -> None:
    """Weights as safetensors, config, generation config, tokenizer and chat template."""
    plain.save_pretrained(folder, safe_serialization=True, max_shard_size=job.max_shard_size)
    artifacts.save_tokenizer(job.tokenizer, folder)
    for path in folder.iterdir():
        artifacts.share(path)  # safetensors files are made for their owner alone


def replace_folder(folder: Path, target: Path) -> None:
    """Move a finished folder into place; what was there before goes once the new one stands."""
    old = folder.with_name("replaced")
    if target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def fits_gpu(size: int) -> bool:
    """Whether there is a GPU with room for a model of so many bytes; otherwise the CPU does it."""
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > GPU_HEADROOM * size


def free_memory() -> None:
    """Give a deleted model's memory back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory() -> dict[str, int]:
    """The most memory this process has held so far, bytes: of the machine, and of the GPU where one was used."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


@contextmanager
def _explained_failures(job: Job) -> Iterator[None]:
    """Turn what goes wrong between loading and the finished folder into one line; nothing is left behind."""
    place = job.target.parent
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"the GPU ran out of memory ({models.first_line(error)}): hide it with CUDA_VISIBLE_DEVICES= to merge on "
            "the CPU",
            exit_code=1,
        ) from error
    except MemoryError as error:
        raise UserError(
            f"no memory to merge a model of {megabytes(job.size)}: use a machine with more", exit_code=1
        ) from error
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(place).free
        raise UserError(
            f"the merged model could not be written to {place} ({models.first_line(error)}; {megabytes(free)} free, "
            f"{megabytes(job.size)} needed): nothing was left there; free room, or name another disk with "
            "--local-save-path",
            exit_code=1,
        ) from error
    except ValueError as error:
        raise UserError(
            f"the adapter in {job.adapter} cannot be merged ({models.first_line(error)}): train it anew"
            + (", or try --dtype float32" if job.dtype != torch.float32 else ""),
            exit_code=1,
        ) from error
