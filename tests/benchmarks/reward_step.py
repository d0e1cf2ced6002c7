"""What a reward step costs: ours against plain ways of doing the same, on the same plans, model and machine.

    python -m tests.benchmarks.reward_step --output docs/reward_step.md          # everything; more than an hour
    python -m tests.benchmarks.reward_step --quick                               # the same, small, in four or five minutes

Compared, greedy, SmolLM2-135M in fp32, and ours with matrix products in bf16 too where the processor has it:
  one-call  plan after plan, one `generate` call per prompt, on a second copy of the model
  ours      PipelineExecutor and FrozenWorker, memory allocation tuned as in a run
  padded    `generate` on one padded batch of a wave's distinct prompts: the fair upper reference
  vllm      a vLLM server, where --vllm-url names one (http://HOST:PORT, started with VLLM_SERVER_DEV_MODE=1, so that
            it can be told to forget an earlier repeat's prompts); one in bf16 with --vllm-bf16-url

Every measurement is a process of its own; the variants take turns, so that a slower minute hits all of them; the
tables show medians. The plans are `sample_plans.py`'s. Fails (exit code 1) where the texts or token counts of
one-call, ours and padded, all in fp32, differ. The section `demo` takes the parts of a training step of the demo.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from common.cli import Parser, count, run, say
from common.errors import UserError
from tests.benchmarks.measure import CpuDtype, Job

SECTIONS = ("grpo", "distinct", "scale", "threads", "memory", "demo")
STYLES = ("instruct", "worked", "few-shot")
SAME_TEXTS = ("one-call", "ours", "padded")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(prog="reward_step", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small repeat of everything")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="repeats (default: 5)")
    parser.add_argument("--completions", type=count, default=24, metavar="N", help="of the mixes (default: 24)")
    parser.add_argument("--max-tokens", type=count, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument("--style", choices=STYLES, default="instruct", help="the worker's (default: instruct)")
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="torch threads (default: 1)")
    parser.add_argument("--vllm-url", default="", metavar="URL", help="compare with this server's base model too")
    parser.add_argument("--vllm-pid", type=int, default=0, metavar="PID", help="its process, for CPU time and memory")
    parser.add_argument("--vllm-bf16-url", default="", metavar="URL", help="the same of a server with --dtype bfloat16")
    parser.add_argument("--vllm-bf16-pid", type=int, default=0, metavar="PID", help="its process")
    parser.add_argument(
        "--no-plain", action="store_true", help="leave out one-call and padded, which take most of the time"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables here, as Markdown")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, compare, and write the tables. Returns the exit code.

    Raises:
        UserError: for a number below 1, a measurement that fails, or variants whose texts differ.
    """
    options = build_parser().parse_args(argv)
    if min(options.repeats, options.completions, options.max_tokens, options.threads) < 1:
        raise UserError("--repeats, --completions, --max-tokens and --threads must be at least 1")
    job = Job(completions=options.completions, max_tokens=options.max_tokens, style=options.style)
    repeats, scale = options.repeats, [8, 32, 128]
    if options.quick:
        job, repeats, scale = replace(job, completions=4, max_tokens=16), 1, [4, 8]
    dtypes = cpu_dtypes()
    ours = [replace(job, cpu_dtype=dtype) for dtype in dtypes]
    plain = () if options.no_plain else ("one-call", "padded")
    variants = [*ours, *(replace(job, variant=name) for name in plain)]
    servers: list[tuple[CpuDtype, str, int]] = [
        ("float32", options.vllm_url, options.vllm_pid),
        ("bfloat16", options.vllm_bf16_url, options.vllm_bf16_pid),
    ]
    for dtype, url, server in servers:
        if url:
            variants.append(replace(job, variant="vllm", cpu_dtype=dtype, url=url, server=server))
    makers: dict[str, Callable[[], str]] = {
        "grpo": lambda: compared("GRPO mix", "grpo", variants, repeats, options.threads),
        "distinct": lambda: compared("All prompts distinct", "distinct", variants, repeats, options.threads),
        "scale": lambda: scaled([replace(job, completions=count) for count in scale], repeats, options.threads),
        "threads": lambda: threaded(job, repeats),
        "memory": lambda: memory(job, dtypes, repeats, options.threads),
        "demo": lambda: demo(dtypes, repeats, options.threads),
    }
    sections = [heading(options, job, repeats), *(makers[name]() for name in options.sections)]
    text = "\n\n".join(sections) + "\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text)
    return 0


Results = dict[Job, list[dict[str, Any]]]


def compared(title: str, plans: str, variants: Sequence[Job], repeats: int, threads: int) -> str:
    """The table of the variants on one kind of plans; raises a `UserError` if their texts differ."""
    results = interleaved([replace(variant, plans=plans) for variant in variants], repeats, threads)
    check_same_texts(results)
    return f"## {title}\n\n{comparison(results)}"


def scaled(jobs: Sequence[Job], repeats: int, threads: int) -> str:
    """The table of our variant with growing numbers of completions."""
    return f"## Scale\n\n{scale_table(interleaved(jobs, repeats, threads))}"


def threaded(job: Job, repeats: int) -> str:
    """The table of our variant on one thread and on two."""
    by_threads = {count: interleaved([job], repeats, count) for count in (1, 2)}
    return f"## Threads\n\n{threads_table(by_threads)}"


def cpu_dtypes() -> Sequence[CpuDtype]:
    """Dtypes in which our matrix products can be computed on this machine."""
    from common.models import multiplies_bf16

    return ("float32", "bfloat16") if multiplies_bf16() else ("float32",)


def demo(dtypes: Sequence[CpuDtype], repeats: int, threads: int) -> str:
    """The table of the parts of a training step of the demo."""
    from common.reports.step_clock import PARTS

    jobs = [Job(task="demo", cpu_dtype=dtype) for dtype in dtypes]
    results = interleaved(jobs, repeats, threads)
    first = results[jobs[0]]
    rows = [
        {"": title, **{job.cpu_dtype: f"{middle(results[job], part):.2f}" for job in jobs}}
        for part, title in {**PARTS, "wall": "the whole step", "peak_mib": "peak MiB"}.items()
    ]
    for row, part in zip(rows, [*PARTS, "wall", "peak_mib"], strict=True):
        row["×"] = f"{middle(results[jobs[-1]], part) / max(middle(first, part), 1e-9):.2f}"
    return f"## A training step of the demo, seconds\n\n{markdown(rows)}"


def memory(job: Job, dtypes: Sequence[CpuDtype], repeats: int, threads: int) -> str:
    """The table of peak memory: one copy of the model with and without packed weights, and two copies unpacked."""
    steps = [replace(job, task="train", cpu_dtype=dtype) for dtype in dtypes]
    steps += [replace(job, task="train", variant=name) for name in ("unpacked", "two-copies")]
    return f"## Memory of a training step\n\n{memory_table(interleaved(steps, repeats, threads))}"


def interleaved(jobs: Sequence[Job], repeats: int, threads: int) -> Results:
    """Run every job `repeats` times, the jobs in turn."""
    results: Results = {job: [] for job in jobs}
    for repeat in range(repeats):
        for job in jobs:
            found = measured(job, threads)
            results[job].append(found)
            say(
                f"{job.task} {job.plans} {job.completions} {named(job)} x{threads}, {repeat + 1} of {repeats}: "
                f"{found['wall']:.1f} s, {found['cpu']:.1f} CPU-s"
            )
    return results


def measured(job: Job, threads: int) -> dict[str, Any]:
    """Run one job in its own process and return its result.

    Raises:
        UserError: if the job fails, with its last line.
    """
    threading = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.measure", json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        env={**os.environ, **threading, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"{job} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", exit_code=1)
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_same_texts(results: Results) -> None:
    """Check that all variants gave the same texts and token counts.

    Raises:
        UserError: if two of them differ.
    """
    texts = {
        job.variant: runs[0]["texts"]
        for job, runs in results.items()
        if job.variant in SAME_TEXTS and job.cpu_dtype == "float32"
    }
    for variant, found in texts.items():
        pairs = zip(texts["ours"], found, strict=True)
        different = sum(ours != other for ours, other in pairs)
        if different:
            raise UserError(f"{variant} and ours differ in {different} answers", exit_code=1)


def named(job: Job) -> str:
    """A variant's name in the tables."""
    return job.variant + (" bf16" if job.cpu_dtype == "bfloat16" else "")


def middle(runs: Sequence[dict[str, Any]], name: str) -> float:
    """Median of one figure over the repeats of a job."""
    return median(found[name] for found in runs)


def comparison(results: Results) -> str:
    """Wall and CPU time, tokens and memory of every variant, and their ratios to ours."""
    ours = next(runs for job, runs in results.items() if job.variant == "ours")
    rows = []
    for job, runs in results.items():
        same = [x == y for x, y in zip(runs[0]["texts"], ours[0]["texts"], strict=True)]
        wall, cpu = middle(runs, "wall"), middle(runs, "cpu")
        has_cpu = job.variant != "vllm" or job.server
        rows.append(
            {
                "": named(job),
                "wall s": f"{wall:.1f}",
                "CPU s": f"{cpu:.1f}" if has_cpu else "-",
                "ours is × faster (wall)": f"{wall / middle(ours, 'wall'):.2f}",
                "(CPU)": f"{cpu / middle(ours, 'cpu'):.2f}" if has_cpu else "-",
                "tokens generated": f"{runs[0]['generated']}",
                "tokens/s": f"{runs[0]['generated'] / wall:.1f}",
                "tokens/CPU-s": f"{runs[0]['generated'] / cpu:.1f}" if has_cpu else "-",
                "peak MiB": f"{middle(runs, 'peak_mib'):.0f}",
                "same answers": f"{sum(same)} of {len(same)}",
            }
        )
    share = 1 - median(found["model_seconds"] / found["wall"] for found in ours)
    return (
        f"{markdown(rows)}\n\n{ours[0]['requests']} worker answers of {ours[0]['charged']} tokens. Outside the model "
        f"(parsing, prompts, tokenising, grading, embeddings): {100 * share:.1f} % of our time."
    )


def scale_table(results: Results) -> str:
    """Time by number of completions."""
    rows: list[dict[str, str]] = []
    before = None
    for job, runs in results.items():
        cpu = middle(runs, "cpu")
        rows.append(
            {
                "completions": f"{job.completions}",
                "wall s": f"{middle(runs, 'wall'):.1f}",
                "CPU s": f"{cpu:.1f}",
                "× the CPU time before": "-" if before is None else f"{cpu / before:.2f}",
                "tokens generated": f"{runs[0]['generated']}",
                "tokens/CPU-s": f"{runs[0]['generated'] / cpu:.1f}",
                "peak MiB": f"{middle(runs, 'peak_mib'):.0f}",
            }
        )
        before = cpu
    return markdown(rows)


def threads_table(by_threads: dict[int, Results]) -> str:
    """Time by number of torch threads."""
    return markdown(
        [
            {"threads": f"{count}", "wall s": f"{middle(runs, 'wall'):.1f}", "CPU s": f"{middle(runs, 'cpu'):.1f}"}
            for count, results in by_threads.items()
            for runs in results.values()
        ]
    )


def memory_table(results: Results) -> str:
    """Peak memory of a GRPO step: total, and without what the libraries take before a model is loaded."""
    two = next(runs for job, runs in results.items() if job.variant == "two-copies")
    base = middle(two, "imports_mib")
    return markdown(
        [
            {
                "": named(job),
                "peak MiB": f"{middle(runs, 'peak_mib'):.0f}",
                "× two copies": f"{middle(runs, 'peak_mib') / middle(two, 'peak_mib'):.2f}",
                "beyond the libraries, MiB": f"{middle(runs, 'peak_mib') - base:.0f}",
                "× two copies ": f"{(middle(runs, 'peak_mib') - base) / (middle(two, 'peak_mib') - base):.2f}",
                "wall s": f"{middle(runs, 'wall'):.1f}",
                "CPU s": f"{middle(runs, 'cpu'):.1f}",
            }
            for job, runs in results.items()
        ]
    )


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of rows that share their keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading(options: argparse.Namespace, job: Job, repeats: int) -> str:
    """Date, machine and settings of the measurement, as text."""
    import torch

    flags = " ".join(sys.argv[1:])
    return (
        f"`python -m tests.benchmarks.reward_step {flags}`, {datetime.now(UTC):%Y-%m-%d}, "
        f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, {options.threads} thread(s), "
        f"{job.completions} completions, {job.style} worker, answers of at most {job.max_tokens} tokens, medians of {repeats}."
    )


if __name__ == "__main__":
    run(main)
