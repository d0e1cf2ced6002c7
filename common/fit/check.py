"""`grpo_training.py --check`: whether a run would fit into memory, what is missing, and what one step generates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import models, prompts
from common.cli import counted, forbid_import
from common.errors import UserErrors
from common.fit import missing
from common.fit.memory import GIB, SERVER, Machine, Part, estimate, peak
from common.fit.shape import ModelShape, model_shape
from common.fit.start import check_models
from common.fit.step import Step, context_of, step_of
from common.problems.questions import (
    Question,
    check_enough,
    check_source,
    load_held_out,
    load_questions,
)
from common.processes.ranks import is_first, world_size
from common.reports.tables import format_table
from common.runs.folder import check_output_dir
from common.settings.grpo import TrainingArgs, check_plan_fits


def check_run(args: TrainingArgs, given: Mapping[str, Any], *, overwrite: bool, resume: bool) -> int:
    """Print what a run would need and what is missing. It loads no weights and writes nothing.

    Args:
        args: settings of the run.
        given: those from the command line.
        overwrite, resume: whether the run would replace, or continue, a run that `--output-dir` contains.

    Returns:
        0 if the run fits and nothing is missing.

    Raises:
        UserErrors: with one line for each problem. Its exit code is what the run itself would end with: 2 if some input
            is wrong, else mostly 1 (no memory, no network, no package).
    """
    if not is_first():
        return 0  # only the first process prints
    found = missing.Found()
    found.add(missing.packages(args), exit_code=1)
    if found.problems:
        raise UserErrors(found.problems, exit_code=found.exit_code)
    found.tried(
        lambda: check_output_dir(
            Path(args.output_dir), overwrite=overwrite, resume=resume, adapter_path=args.adapter_path
        )
    )
    offline = missing.hub_problem(args)
    questions = found.tried(lambda: _questions(args))
    found.tried(lambda: missing.check_wandb(args))
    if not args.wandb:
        forbid_import("wandb")
    loaded = found.tried(lambda: _base(args, given, offline))
    machine = found.tried(lambda: this_machine(args))
    if loaded is not None:
        config, tokenizer = loaded
        shape = model_shape(config, args)
        size = shape.stored_bytes * shape.parameters
        download = found.tried(lambda: missing.check_base_files(args.base_model, size, offline))
        print(_model_line(args, shape, download))
        if machine is not None:
            print(_products_line(args, machine))
        if questions:
            step = step_of(args, questions, tokenizer)
            print(_step_lines(args, step, len(questions)))
            found.tried(lambda: check_plan_fits(args, step.planner_prompt, context_of(config)))
            if machine is not None:
                parts = estimate(args, shape, step, machine)
                print(_memory_table(parts, machine))
                found.add(does_not_fit(args, parts, machine), exit_code=1)
    found.tried(lambda: missing.check_encoder(args.embedding_model, offline))
    found.tried(lambda: missing.check_server(args))
    if found.problems:
        raise UserErrors(found.problems, exit_code=found.exit_code)
    print("it fits, and nothing is missing")
    return 0


def this_machine(args: TrainingArgs) -> Machine:
    """The first GPU, or the main memory of this machine if it has none.

    Raises:
        UserError: if --cpu-dtype is set to a value that this machine does not support.
    """
    import torch

    four_bit = models.use_4bit(args)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Machine(True, torch.cuda.get_device_name(), total, free, four_bit)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Machine(False, "this machine", *_ram(), four_bit, models.cpu_dtype(args), processes)


def does_not_fit(args: TrainingArgs, parts: Sequence[Part], machine: Machine) -> list[str]:
    """One line if memory is too small, with advice for the part that takes most of it; [] if the run fits.

    Args:
        args: settings of the run.
        parts: as `common.fit.memory.estimate` returns them.
        machine: on which the run would train.
    """
    needed = peak(parts, machine)
    if needed <= min(machine.free, machine.total):
        return []
    largest = max(parts, key=lambda part: part.bytes)
    ways = {
        "always": "a smaller --base-model" + ("" if machine.four_bit or not machine.gpu else ", or --4bit"),
        "loading": "a smaller --base-model",
        "rollouts": "lower --batch-size or --grad-accum, or --max-completion-length",
        "worker": "lower --worker-batch-tokens",
        "training": "lower --batch-size and raise --grad-accum in turn, or lower --max-completion-length"
        + ("" if largest.name.endswith("checkpointed") else ", or --gradient-checkpointing"),
    }
    if largest.name.startswith("adapter") and args.adapter_path is None:
        ways["always"] = f"lower --lora-r ({args.lora_r}), or give --lora-layers, or a smaller --base-model"
    if largest.name == SERVER:
        ways["always"] = "lower --vllm-gpu-memory" if machine.gpu else "serve elsewhere, and name it with --vllm-url"
    what = f"memory: {needed / GIB:.1f} GiB are needed, {machine.name} has {machine.total / GIB:.1f}"
    way = ways[largest.when]
    if needed <= machine.total:
        what += f", of which {machine.free / GIB:.1f} are free"
        way = f"end other programs, or {way}"
    return [f"{what}; most of it is for {largest.name}: {way}"]


def _questions(args: TrainingArgs) -> list[Question]:
    """The run's questions, after the checks that a run makes. Held-out questions are checked too."""
    check_source(args.dataset, args.dataset_split)
    if args.eval_dataset is not None:
        check_source(args.eval_dataset, "test", flag="--eval-dataset")
    questions = load_questions(
        args.dataset, limit=args.max_samples, config=args.dataset_config, split=args.dataset_split, seed=args.seed
    )
    check_enough(args, len(questions))
    if args.eval_samples:
        load_held_out(args, questions)
    return questions


def _base(args: TrainingArgs, given: Mapping[str, Any], offline: str | None) -> tuple[Any, Any]:
    """Config and tokenizer of the base model, after the checks that a run makes."""
    from transformers import AutoConfig

    models.quiet_transformers()
    check_models(args, given)
    missing.check_hub_model(args.base_model, lambda: offline)
    source, options = models.unconverted(args.base_model)
    with models.explained(args.base_model):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    tokenizer = models.load_tokenizer(source, **options)
    style = None if args.worker_url else args.worker_style
    prompts.check_shown(tokenizer, prompts.sample_requests(args.planner_style, style))
    return config, tokenizer


def _ram() -> tuple[float, float]:
    """(total, free) bytes of this machine's memory. In a container, its memory limit counts too."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    free, meminfo, group = total, Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        free = 1024.0 * _numbers(meminfo)["MemAvailable"]
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, float(text))
        cached = _numbers(group / "memory.stat")["inactive_file"]  # a file cache, freed when memory is needed
        free = min(free, total - float((group / "memory.current").read_text()) + cached)
    return total, free


def _numbers(path: Path) -> dict[str, int]:
    """Read a file with one name and one number per line."""
    rows = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in rows}


def _model_line(args: TrainingArgs, shape: ModelShape, download: str | None) -> str:
    layers = "" if shape.open_layers == shape.layers else f" on the last {shape.open_layers}"
    return (
        f"base model  {args.base_model}: {shape.parameters:,} parameters, {counted(shape.layers, 'layer')}"
        f"{'' if download is None else f' ({download})'}\n"
        f"adapter     {shape.trained:,} parameters, LoRA of rank {shape.rank}{layers}"
    )


def _products_line(args: TrainingArgs, machine: Machine) -> str:
    """The number format of matrix products, which on a CPU may differ from that of the weights."""
    if machine.gpu:
        return f"products    matrix products in {'bf16' if models.has_native_bf16() else 'fp16'}"
    kind = "bf16" if machine.cpu_dtype == "bfloat16" else "fp32"
    return f"products    matrix products in {kind} (--cpu-dtype {args.cpu_dtype})"


def _step_lines(args: TrainingArgs, step: Step, questions: int) -> str:
    processes = world_size()
    asked, completions = processes * step.questions, processes * step.completions
    calls = processes * (step.solve.calls + step.combine.calls)
    drawn = args.max_steps * processes * step.questions // args.num_iterations
    return (
        f"a step      {counted(asked, 'question')} × {args.num_generations} = {counted(completions, 'completion')}, "
        f"{counted(completions * args.max_completion_length, 'token', ',')} at most; "
        f"{counted(calls, 'worker call', ',')} and {calls * args.worker_max_tokens:,} of their tokens at most\n"
        f"the run     {counted(args.max_steps, 'step')} {'draws' if args.max_steps == 1 else 'draw'} "
        f"{counted(drawn, 'question', ',')} from {questions:,}: each {drawn / questions:,.2f} times"
    )


def _memory_table(parts: Sequence[Part], machine: Machine) -> str:
    """All parts, the largest sum of parts that exist at the same time, and the memory of the machine."""
    rows = [(part.name, part.bytes) for part in parts]
    each = f" ({machine.processes} processes)" if machine.processes > 1 else ""
    rows += [(f"at the worst moment{each}", peak(parts, machine)), (f"{machine.name} has", machine.total)]
    rows.append(("of which free now", machine.free))
    table = format_table([(name, f"{size / GIB:.2f}") for name, size in rows], ["memory, at most", "GiB"])
    return f"\n{table}\n"
