"""What all campaigns share: a folder with a tiny model and data, planted keys, counts and findings."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from planted import HUB, OPENAI, WANDB, found
from tiny import QUESTIONS, teach_planner

from common.evaluation.during_training import SAVED_QUESTIONS

# Keys in every place where a script looks for one. Each has the line break that careless copying adds.
PLANTED = {
    "OPENAI_API_KEY": OPENAI + "\n", "HF_TOKEN": HUB + "\n", "WANDB_API_KEY": WANDB + "\n",
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HTTP_PROXY": "", "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}  # fmt: skip
# A run of seconds on the tiny model: four steps, a checkpoint after every second one.
STEPS, SAVE_STEPS, PER_STEP = 4, 2, 4
SMALL = (
    "--planner-style", "short", "--worker-style", "few-shot", "--worker-max-tokens", "8",
    "--max-completion-length", "48", "--batch-size", "4", "--grad-accum", "1", "--num-generations", "4",
    "--max-steps", str(STEPS), "--save-steps", str(SAVE_STEPS), "--temperature", "1", "--lr", "1e-3",
    "--lr-schedule", "constant", "--no-wandb", "--no-4bit",
)  # fmt: skip


@dataclass
class Stage:
    """The folder, clock, random generator, counts and findings of a campaign."""

    folder: Path
    minutes: float
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def model(self) -> Path:
        """The tiny planner. It is trained at the first access, which takes up to a minute."""
        return self._taught("tiny-planner")

    @property
    def served_model(self) -> Path:
        """The tiny planner with attention heads that vLLM takes."""
        return self._taught("served-planner", head_dim=32)

    @property
    def questions(self) -> Path:
        """Training questions, in GSM8K's schema."""
        return self._questions("train.jsonl", QUESTIONS)

    @property
    def held_out(self) -> Path:
        """Questions for the scoreboard."""
        return self._questions("held-out.jsonl", [f"What is {a} + {b} + {c}?" for a, b, c in [(1, 6, 2), (3, 3, 9)]])

    @property
    def many_held_out(self) -> Path:
        """Questions for a scoreboard whose rows are saved in several parts."""
        several = range(2 * SAVED_QUESTIONS + 30)
        texts = [f"What is {n // 100 + 10} + {n // 10 % 10} + {n % 10}?" for n in several]
        return self._questions("many-held-out.jsonl", texts)

    def grpo(self, output_dir: Path, *more: str) -> list[str]:
        """Flags of a GRPO run that takes seconds."""
        return [
            "--base-model", str(self.model), "--dataset", str(self.questions), "--output-dir", str(output_dir),
            *SMALL, *more,
        ]  # fmt: skip

    def sft(self, output_dir: Path, *more: str) -> list[str]:
        """Flags of a supervised run that takes seconds."""
        return [
            "--base-model", str(self.model), "--output-dir", str(output_dir), "--format", "json-plan", "--dataset",
            "generated:shares", "--max-samples", "12", "--max-seq-len", "200", "--batch-size", "1", "--grad-accum", "2",
            "--lr", "1e-3", "--save-steps", str(SAVE_STEPS), "--no-wandb", "--no-4bit", *more,
        ]  # fmt: skip

    def time_left(self) -> bool:
        """Whether the campaign has time left."""
        return time.monotonic() - self.started < 60 * self.minutes

    def fails(self, what: str) -> None:
        """Store a finding, and print it at once."""
        self.findings.append(what)
        print(f"FINDING {what}".encode("ascii", "backslashreplace").decode(), flush=True)

    def report(self) -> str:
        """Counts and findings."""
        spent = (time.monotonic() - self.started) / 60
        counted = "\n".join(f"  {self.counts[name]:>9,}  {name}" for name in sorted(self.counts))
        return f"{spent:.1f} minutes, seed {self.seed}\n{counted}\n  {len(self.findings):>9,}  findings"

    def _taught(self, name: str, **shape: int) -> Path:
        folder = self.folder / name
        if not folder.exists():
            making = folder.with_name("making")
            shutil.rmtree(making, ignore_errors=True)
            teach_planner(making, **shape)
            making.rename(folder)
        return folder

    def _questions(self, name: str, texts: list[str]) -> Path:
        path = self.folder / name
        if not path.exists():
            rows = [{"question": q, "answer": f"#### {sum(map(int, q[8:-1].split(' + ')))}"} for q in texts]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path


def shown_keys(folder: Path) -> Iterator[str]:
    """Yield files below a folder that contain a part of a planted key, plain, escaped or encoded.

    It searches text files and the records of W&B.
    """
    seen: set[str] = set()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink() or path.suffix in (".safetensors", ".png", ".pt", ".pth", ".bin"):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest in seen or path.name == "tokenizer.json":  # its vocabulary is a copy of the model's
            continue
        seen.add(digest)
        parts = {part for key in (OPENAI, HUB, WANDB) for part in found(key, content.decode("latin-1"))}
        if parts:
            yield f"{path.relative_to(folder)}: {len(parts)} parts of a planted key"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
