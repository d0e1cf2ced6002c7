"""Merge an adapter into its base model with the memory of one model, and certify what was written to disk."""

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
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from common import models
from common.cli import say
from common.errors import UserError
from common.merging import certificate as certifying
from common.merging.job import GPU_HEADROOM, Job, dtype_name
from common.merging.unfinished import MODEL, REPLACED, workplace_prefix
from common.runs.adapters import save_tokenizer
from common.runs.files import megabytes, share, write_json
from common.runs.record import run_record


def merge(job: Job) -> dict[str, Any]:
    """Merge, save, load again and certify. The folder `job.target` appears complete, or not at all.

    Only one model is in memory at a time: first adapter on base, which becomes the merged model layer by layer; then
    the merged model, loaded from disk.

    Returns:
        The report, which is also saved with the model.

    Raises:
        UserError: if memory or disk space runs out, or weights become NaN.
    """
    started = time.perf_counter()
    target = job.target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    gpu = fits_gpu(job.size)
    with (
        _explained_failures(job),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=workplace_prefix(target)) as temporary,
    ):
        folder = Path(temporary) / MODEL
        asked = certifying.planner_prompts(job.tokenizer, job.planner_style)
        say(f"adapter on base, on the {'GPU' if gpu else 'CPU'}: {len(asked)} plans to compare with")
        model, reference, base_logits, quantised_on = measure_adapter(job, asked, gpu=gpu)
        if job.quantised_on is not None and quantised_on != job.quantised_on:
            say(
                f"note: the adapter was trained on a base quantised on {job.quantised_on}, this one is quantised on "
                f"{quantised_on}: the two need not round alike"
            )
        say(f"merging, into {dtype_name(job.dtype)}")
        kept, plain = merge_weights(model, job.dtype)
        save(plain, job, folder)
        del model, plain
        free_memory()
        say("merged model, loaded back from disk: comparing the same plans")
        merged = measure_merged(job, folder, asked, reference, gpu=gpu)
        found = certifying.certify(
            job.tokenizer, reference, base_logits, merged, update_kept=kept, dtype=dtype_name(job.dtype)
        )
        report = {
            "inputs": job.inputs,
            "certificate": found.to_dict(),
            "quantised_on": quantised_on,
            "model_bytes": job.size,
            "peak_memory_bytes": peak_memory(),
            "seconds": round(time.perf_counter() - started, 1),
            "versions": run_record({})["versions"],
            "files": certifying.file_hashes(folder),
        }
        write_json(folder / certifying.REPORT, report)
        replace_folder(folder, target)
    return report


def measure_adapter(
    job: Job, asked: list[list[int]], *, gpu: bool
) -> tuple[PeftModel, certifying.Evidence, list[torch.Tensor], str | None]:
    """Load adapter on base, and record its plans and logits.

    Args:
        job: the merge.
        asked: prompts as token ids.
        gpu: whether to use the GPU.

    Returns:
        The model, ready to be merged; its plans and logits; the logits (T, V) of the base model alone on these plans;
        and the device that quantised the base model (None if it is not quantised).
    """
    base = models.load_base(
        job.base,
        four_bit=job.four_bit,
        dtype=None if job.four_bit else job.load_dtype,  # None: the dtype in which 4-bit training computes
        revision=job.revision,
        gpu=gpu,
    )
    quantised_on = models.quantised_on(base) if job.four_bit else None
    if job.rows is not None:
        base.resize_token_embeddings(job.rows, mean_resizing=False)
    model = PeftModel.from_pretrained(base, str(job.adapter))
    plans = certifying.write_plans(model, job.tokenizer, asked, adapter=True)
    reference = certifying.Evidence(plans, certifying.predictions(model, asked, plans, adapter=True))
    base_logits = certifying.predictions(model, asked, plans, adapter=False)
    if job.four_bit:
        # PEFT would round merged weights to 4 bits again, which loses a small update; so dequantise before.
        plain = model.unload().dequantize(dtype=job.load_dtype)
        model = PeftModel.from_pretrained(plain, str(job.adapter))
    return model, reference, base_logits, quantised_on


def measure_merged(
    job: Job, folder: Path, asked: list[list[int]], reference: certifying.Evidence, *, gpu: bool
) -> certifying.Evidence:
    """Load the merged model from disk, and record its own plans and its logits on the reference's plans.

    Args:
        job: the merge.
        folder: of the merged model.
        asked: prompts as token ids.
        reference: plans and logits of adapter on base.
        gpu: whether to use the GPU.
    """
    with models.explained(str(folder)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map="cuda" if gpu else None, trust_remote_code=False
        )
    return certifying.Evidence(
        ids=certifying.write_plans(model, job.tokenizer, asked, adapter=False),
        logits=certifying.predictions(model, asked, reference.ids, adapter=False),
    )


def merge_weights(model: PeftModel, dtype: torch.dtype) -> tuple[float | None, Any]:
    """Merge an adapter layer by layer; each layer is computed in fp32 and rounded once.

    PEFT computes the merged weights W + Δ, so every variant of LoRA that it knows works. Done in a 16-bit model, PEFT
    would round the update Δ first and then the sum again. For plain LoRA, Δ = (lora_alpha / r) · B A
    (arXiv:2106.09685).

    Args:
        model: adapter on an unquantised base model; it is changed.
        dtype: of the merged weights.

    Returns:
        The share of the update that the rounded weights hold, and the model without PEFT. The share is the projection
        ⟨round(W + Δ) − round(W), Δ⟩ / |Δ|² over all layers; None if Δ is 0 everywhere.

    Raises:
        ValueError: if a merged layer has NaN or infinite weights.
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
        warnings.simplefilter("ignore", UserWarning)  # "already merged", which the loop above did
        plain: Any = model.merge_and_unload()
    return (held / total if total else None), plain.to(dtype)


def save(plain: Any, job: Job, folder: Path) -> None:
    """Save weights (safetensors), config, generation config, tokenizer and chat template to a folder.

    Args:
        plain: the merged model, without PEFT.
        job: the merge.
        folder: temporary folder of the result.
    """
    plain.save_pretrained(folder, safe_serialization=True, max_shard_size=job.max_shard_size)
    save_tokenizer(job.tokenizer, folder)
    for path in folder.iterdir():
        share(path)  # safetensors creates files that only their owner can read


def replace_folder(folder: Path, target: Path) -> None:
    """Move a finished folder to its place. An older folder there is removed after the new one is in place."""
    old = folder.with_name(REPLACED)
    if target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def fits_gpu(size: int) -> bool:
    """Whether there is a GPU with room for a model of this size (bytes). If not, the CPU is used."""
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > GPU_HEADROOM * size


def free_memory() -> None:
    """Release the memory of a deleted model before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory() -> dict[str, int]:
    """Most memory that this process has used so far, in bytes: RAM, and GPU memory if a GPU was used."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


@contextmanager
def _explained_failures(job: Job) -> Iterator[None]:
    """Context manager: turn an error between loading and the finished folder into one line that says what to do."""
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
            f"the adapter in {job.adapter} cannot be merged ({models.first_line(error)}): train it again"
            + (", or try --dtype float32" if job.dtype != torch.float32 else ""),
            exit_code=1,
        ) from error
