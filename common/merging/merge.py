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
    """Merge, save, reload and certify; the folder appears at `job.target` whole or not at all.

    One model is in memory at a time: adapter on base, which becomes the merged one layer by layer, then the
    merged one read back from disk.

    Returns:
        the report, which is saved beside the model.

    Raises:
        UserError: for memory or disk that runs out, and weights that come out as NaN.
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
        say("merged model, loaded back from disk: the same plans")
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
    """Adapter on base: the model ready to be merged, its evidence, and the base's own logits on the same plans.

    The last of the four is the device that quantised the base, None for an unquantised one.
    """
    base = models.load_base(
        job.base,
        four_bit=job.four_bit,
        dtype=None if job.four_bit else job.load_dtype,  # the dtype that 4-bit training computes in
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
        # PEFT would round the merged weights to 4 bits again, which loses a small update: dequantise first.
        plain = model.unload().dequantize(dtype=job.load_dtype)
        model = PeftModel.from_pretrained(plain, str(job.adapter))
    return model, reference, base_logits, quantised_on


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
    save_tokenizer(job.tokenizer, folder)
    for path in folder.iterdir():
        share(path)  # safetensors files are made for their owner alone


def replace_folder(folder: Path, target: Path) -> None:
    """Move a finished folder into place; what was there before goes once the new one stands."""
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
