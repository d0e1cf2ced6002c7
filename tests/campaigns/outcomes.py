"""What a run must leave: complete files directly after a kill, and in the end the outcome of an undisturbed run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.reports.jsonl import read_jsonl
from common.runs.adapters import safetensors_problem
from common.runs.checkpoints import checkpoint_step, complete_checkpoints

from .stage import PER_STEP, SAVE_STEPS, digest

TIMELESS = (
    "step",
    "reward",
    "loss",
    "correctness",
    "invalid_plan_rate",
    "planner_tokens",
    "worker_tokens",
    "grad_norm",
)


def grpo_outcome(folder: Path) -> Any:
    """Weights, and the content of metrics and samples without times."""
    metrics = [{name: row.get(name) for name in TIMELESS} for row in read_jsonl(folder / "metrics.jsonl")]
    keys = ("step", "question", "completion", "reward")
    samples = [{key: row[key] for key in keys} for row in read_jsonl(folder / "samples.jsonl")]
    return {"weights": digest(folder / "adapter_model.safetensors"), "metrics": metrics, "samples": samples,
            "files": sorted(path.name for path in folder.iterdir())}  # fmt: skip


def sft_outcome(folder: Path) -> Any:
    """Weights, and the content of metrics without times."""
    keys = ("step", "loss", "eval_loss", "grad_norm")
    metrics = [{key: row.get(key) for key in keys} for row in read_jsonl(folder / "metrics.jsonl")]
    return {"weights": digest(folder / "adapter_model.safetensors"), "metrics": metrics,
            "files": sorted(path.name for path in folder.iterdir())}  # fmt: skip


def board_outcome(folder: Path) -> Any:
    """The scoreboard without times, and the adapter, which it must not change."""
    rows = [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_jsonl(folder / "evaluation.jsonl")
    ]
    summary = json.loads((folder / "evaluation.json").read_text())
    for row in summary["rows"].values():
        del row["seconds"]
    return {"rows": json.loads(json.dumps(rows)), "summary": summary, **grpo_outcome(folder)}


def merge_outcome(folder: Path) -> Any:
    """The content of every weight file, and the names of all files."""
    merged = folder / "merged"
    return {"weights": {path.name: digest(path) for path in merged.glob("*.safetensors")},
            "files": sorted(path.name for path in merged.iterdir()), "beside": sorted(p.name for p in folder.iterdir())}  # fmt: skip


def batch_outcome(folder: Path) -> Any:
    """Every answer, without its time."""
    rows = read_jsonl(folder / "answers.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def broken_run(folder: Path) -> Iterator[str]:
    """Yield what is wrong in a folder in which a run was killed."""
    yield from half_files(folder)
    for name in ("metrics.jsonl", "samples.jsonl", "answers.jsonl", "evaluation.jsonl"):
        path = folder / name
        try:
            rows = read_jsonl(path) if path.exists() else []
        except UserError as error:
            yield str(error)
            continue
        if name == "metrics.jsonl":
            steps = [row["step"] for row in rows if "eval_loss" not in row]
            if steps != list(range(1, len(steps) + 1)):
                yield f"metrics.jsonl has the steps {steps}"
            whole = complete_checkpoints(folder)
            kept = checkpoint_step(whole[-1]) if whole else 0
            if len(steps) - kept > SAVE_STEPS:
                yield f"{len(steps)} steps done, {kept} kept"
        elif name == "samples.jsonl":
            steps = [row["step"] for row in rows]
            ranks = 2 if "two-ranks" in folder.name else 1
            if steps != sorted(steps) or any(steps.count(step) > ranks * PER_STEP for step in steps):
                yield f"samples.jsonl has the steps {steps}"
        elif name == "answers.jsonl" and len({row["line"] for row in rows}) != len(rows):
            yield "answers.jsonl has a line twice"


def broken_merge(folder: Path) -> Iterator[str]:
    """Yield what is wrong after a kill of a merge. The target must be complete or missing, or the older one be kept."""
    target = folder / "merged"
    kept = [target, *folder.glob(".merging-*/replaced")]
    for place in kept:
        if not place.exists():
            continue
        yield from half_files(place)
        report = json.loads((place / "certification.json").read_text())
        for name, wanted in report["files"].items():
            if digest(place / name) != wanted:
                yield f"{place.name}/{name} is not the certified file"
    if "over-an-older" in folder.name and not any(place.exists() for place in kept):
        yield "the older merge is gone and no new one is there"


def half_files(folder: Path) -> Iterator[str]:
    """Yield incomplete files with a final name. Files of a checkpoint count only if it is taken as complete."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                yield f"{path.name} is no JSON: {error}"
        elif path.suffix == ".safetensors" and (problem := safetensors_problem(path)) is not None:
            yield problem
        elif path.suffix == ".png" and path.read_bytes()[-8:-4] != b"IEND":
            yield f"{path.name} is cut off"


def difference(expected: Any, got: Any, where: str = "") -> list[str]:
    """The differences between two outcomes, one line each."""
    if isinstance(expected, dict) and isinstance(got, dict):
        names = sorted({*expected, *got}, key=str)
        return [line for name in names for line in difference(expected.get(name), got.get(name), f"{where}/{name}")]
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        pairs = enumerate(zip(expected, got, strict=True))
        return [line for number, (a, b) in pairs for line in difference(a, b, f"{where}/{number}")][:5]
    return [] if expected == got else [f"{where} is {str(got)[:200]}, not {str(expected)[:200]}"]
