"""One measurement in its own process: `python -m tests.benchmarks.measure '{"task": "reward", …}'`.

Prints one line of JSON. `reward_step` starts it, repeats it and compares the results. A new process each time means
that no measurement uses caches, memory or threads of another.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.benchmarks import mix

CpuDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        task: "reward" for one call of the reward function's pipeline; "train" for a short GRPO run; "demo" for steps of
            the demo's GRPO run.
        variant: "one-call", "ours", "padded" or "vllm". For "train": "ours", "unpacked" (ours without packed copies of
            the weights) or "two-copies" (unpacked, with a second copy of the model, as a plain implementation has).
        plans: "grpo" or "distinct".
        completions: number of completions.
        max_tokens: limit of the worker's answer, in tokens.
        style: of the worker's prompts.
        cpu_dtype: of our matrix products, or of the server.
        url: of the vLLM server.
        server: its process id, whose CPU time and memory are measured too; 0 for none.
    """

    task: str = "reward"
    variant: str = "ours"
    plans: str = "grpo"
    completions: int = 24
    max_tokens: int = 128
    style: Literal["instruct", "worked", "few-shot"] = "instruct"
    cpu_dtype: CpuDtype = "float32"
    url: str = ""
    server: int = 0


def reward_step(job: Job) -> dict[str, Any]:
    """Carry out the plans once. Returns seconds, tokens, peak memory in MiB, and the texts."""
    from common.models import load_base, load_tokenizer
    from common.pipeline import PipelineExecutor
    from common.settings.grpo import PACKAGED_MODEL, TrainingArgs
    from common.similarity import Embeddings, SentenceEncoder
    from common.training import device
    from common.workers.local import FrozenWorker

    if job.variant == "ours":
        device.tune_for_cpu()  # as in our runs; the other variants do without it
    items = (mix.grpo_mix if job.plans == "grpo" else mix.distinct_mix)(job.completions)
    encoder = SentenceEncoder(TrainingArgs.embedding_model)
    encoder(["load the encoder"])
    imports = peak_mib()
    tokenizer = load_tokenizer(PACKAGED_MODEL)
    models = []
    if job.variant != "vllm":
        # A plain implementation holds two copies: the worker, and the model that the trainer trains.
        models = [
            load_base(PACKAGED_MODEL, four_bit=False, cpu_dtype=job.cpu_dtype).eval()
            for _ in range(1 + (job.variant == "one-call"))
        ]
    worker: Any
    if job.variant == "vllm":
        worker = mix.VllmWorker(job.url, tokenizer, style=job.style, max_tokens=job.max_tokens)
    elif job.variant == "ours":
        worker = FrozenWorker(models[0], tokenizer, style=job.style, max_tokens=job.max_tokens, cpu_dtype=job.cpu_dtype)
    else:
        worker = mix.GenerateWorker(
            models[0], tokenizer, style=job.style, max_tokens=job.max_tokens, at_once=job.variant == "padded"
        )
    worker.generate([[{"role": "user", "content": "Hello"}]])  # warm-up, not part of the measured step
    worker.take_stats()
    if job.variant == "vllm":
        worker.forget()

    cpu, wall = cpu_seconds(job.server), time.perf_counter()
    if job.variant == "one-call":
        found = mix.plain_pipeline(items, lambda request: worker.generate([request])[0], job.style)
    else:
        results = PipelineExecutor(worker, Embeddings(encoder)).execute_batch(items)
        found = [[*r.solutions, *([r.final] if r.final else [])] for r in results]
    wall, cpu = time.perf_counter() - wall, cpu_seconds(job.server) - cpu
    stats = worker.take_stats()
    return {
        "wall": wall,
        "cpu": cpu,
        "model_seconds": stats.model_seconds,
        "requests": sum(map(len, found)),
        "charged": sum(answer.tokens for answers in found for answer in answers),
        "generated": stats.generated_tokens,
        "imports_mib": imports,
        "peak_mib": peak_mib(),
        "texts": [[answer.text, answer.tokens] for answers in found for answer in answers],
    }


def training_steps(job: Job) -> dict[str, Any]:
    """Run two GRPO steps with the default batch sizes. Returns seconds, and peak memory in MiB."""
    from common import models
    from common.decoding import packing
    from common.problems.questions import Question
    from common.settings.grpo import PACKAGED_MODEL, TrainingArgs
    from common.training import device, grpo

    if job.variant != "ours":
        packing.MIN_ROWS = sys.maxsize
    device.quiet_libraries(debug=False)
    device.tune_for_cpu()
    imports = peak_mib()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArgs(
            base_model=PACKAGED_MODEL,
            output_dir=folder,
            use_4bit=False,
            cpu_dtype=job.cpu_dtype,
            planner_style="short",
            max_steps=2,
            save_steps=100,
            max_completion_length=job.max_tokens,
            worker_max_tokens=job.max_tokens,
            worker_style=job.style,
        )
        tokenizer = models.load_tokenizer(PACKAGED_MODEL)
        questions = [Question(group[0].question, group[0].ground_truth or "") for group in mix.load_groups()]
        trainer, executor = grpo.build_trainer(args, questions, tokenizer)
        reward: Any = trainer.reward_funcs[0]
        # An untrained small planner writes no valid plan; solving directly instead gives the worker its usual load.
        reward.executor = executor.with_fallback()
        if job.variant == "two-copies":
            second = models.load_base(PACKAGED_MODEL, four_bit=False).eval()
            reward.executor.worker = mix.GenerateWorker(
                second, tokenizer, style=job.style, max_tokens=job.max_tokens, at_once=False
            )
        cpu, wall = cpu_seconds(), time.perf_counter()
        trainer.train()
        return {
            "wall": time.perf_counter() - wall,
            "cpu": cpu_seconds() - cpu,
            "imports_mib": imports,
            "peak_mib": peak_mib(),
        }


def demo_steps(job: Job) -> dict[str, Any]:
    """Run three GRPO steps of the demo's size. Returns mean seconds of the parts of the last two, and peak MiB."""
    from common import models
    from common.problems.questions import load_questions
    from common.reports.jsonl import read_jsonl
    from common.reports.step_clock import PARTS
    from common.settings.grpo import DEMO, TrainingArgs
    from common.training import device, grpo

    device.quiet_libraries(debug=False)
    device.tune_for_cpu()
    with tempfile.TemporaryDirectory() as folder:
        changed = {"output_dir": folder, "max_steps": 3, "eval_samples": 0, "cpu_dtype": job.cpu_dtype}
        args = TrainingArgs(**{**DEMO, **changed})
        questions = load_questions(args.dataset, limit=args.max_samples, seed=args.seed)
        trainer, executor = grpo.build_trainer(args, questions, models.load_tokenizer(args.base_model))
        reward: Any = trainer.reward_funcs[0]
        reward.executor = executor.with_fallback()  # because an untrained planner writes no valid plan
        trainer.train()
        steps = read_jsonl(Path(folder) / "metrics.jsonl")[1:]
    means = {part: sum(step.get(part) or 0.0 for step in steps) / len(steps) for part in PARTS}
    return {"wall": sum(means.values()), "cpu": cpu_seconds(), "peak_mib": peak_mib(), **means}


def cpu_seconds(server: int = 0) -> float:
    """CPU seconds of this process with its ended children and, if given, of a server's process and its children."""
    total = sum(os.times()[:4])  # user and system, own and the children's
    for process in server_processes(server):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def server_processes(server: int) -> Sequence[Any]:
    """A server's process and its children; empty without a server."""
    if not server:
        return []
    import psutil

    parent = psutil.Process(server)
    return [parent, *parent.children(recursive=True)]


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Run the job in the first argument (JSON), with as many torch threads as OMP_NUM_THREADS says."""
    job = Job(**json.loads(sys.argv[1]))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = {"train": training_steps, "demo": demo_steps, "reward": reward_step}[job.task](job)
    if job.server:
        result["peak_mib"] = sum(process.memory_info().rss for process in server_processes(job.server)) / 2**20
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
