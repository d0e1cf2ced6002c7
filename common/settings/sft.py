"""All settings of the supervised baseline. Nothing heavy is imported here.

Settings without a default here have it at the top of `dummy_planner.py`, where it is documented.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from common.errors import UserErrors
from common.settings.fields import check_values, setting
from common.settings.grpo import DEMO


@dataclass(kw_only=True)
class SupervisedArgs:
    """Settings of the supervised baseline. Lengths are in tokens. Each field's help text documents it."""

    # fmt: off
    base_model: str = setting(MISSING, "model", "Hub id or folder of the base model", metavar="MODEL", local="name")
    use_4bit: bool | None = setting(None, "model", "base model in NF4 with double quantisation (default: 4-bit on a GPU, --cpu-dtype without)")
    cpu_dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "model", "number format of matrix products on a CPU. bfloat16 is faster, most of all in forward and backward; but where two tokens are almost equally likely, a greedy answer may then depend on the other prompts in its batch. auto: bfloat16 if the processor has instructions for it (AVX512-BF16, AMX) and weights are not quantised, else float32. Not used on a GPU")
    lora_r: int = setting(16, "model", "LoRA rank", positive=True)
    lora_alpha: int = setting(32, "model", "LoRA scale numerator: the update is multiplied by alpha / r", positive=True)
    lora_dropout: float = setting(0.0, "model", "LoRA dropout", fraction=True, below=1)
    lora_layers: int | None = setting(None, "model", "adapt only the last N layers (default: all)", positive=True)
    adapter_path: str | None = setting(None, "model", "continue from this LoRA adapter", metavar="DIR", local="path")

    format: Literal["planning-data", "json-plan"] = setting("planning-data", "data", "columns SystemPrompt, UserPrompt, ExpectedOutput; or JSON plans in the GRPO planner's prompt")
    dataset: str = setting(MISSING, "data", "Hub id, .jsonl/.parquet file or folder; for json-plan GSM8K's socratic variant, generated:shares, or several problems in one question: multi:SOURCE[?parts=2-3&single=0.3&max_steps=3&kind=sum|chained]", local="name")
    dataset_config: str | None = setting(None, "data", "configuration of a Hub data set ('socratic' for openai/gsm8k)", metavar="NAME")
    max_samples: int | None = setting(None, "data", "use at most this many rows (default: all)", positive=True)
    max_seq_len: int = setting(MISSING, "data", "longer rows are cut at the end", positive=True)
    planner_style: Literal["full", "short"] = setting("full", "data", "wording of the planner's system message (json-plan)")

    worker_context: Literal["question", "none"] = setting("question", "data", "what the worker will see of a question when it solves a part (json-plan); the planner's prompt says so, as in grpo_training.py")
    lr: float = setting(MISSING, "training", "peak learning rate (AdamW, linear decay)", positive=True, below=1)
    batch_size: int = setting(MISSING, "training", "rows per device and forward/backward pass", positive=True)
    grad_accum: int = setting(MISSING, "training", "passes per optimiser step", positive=True)
    num_epochs: float = setting(MISSING, "training", "passes over the data", positive=True)
    warmup_steps: int = setting(0, "training", "steps of linear warm-up", minimum=0)
    gradient_checkpointing: bool | None = setting(None, "training", "recompute activations to save memory (default: on a GPU only)")
    seed: int = setting(42, "training", "seed of initialisation, data order and demonstrated plans", minimum=0, below=2**32)

    output_dir: str = setting(MISSING, "output", "folder for all files of the run", metavar="DIR", local="path")
    save_steps: int = setting(100, "output", "steps between checkpoints and evaluations", positive=True)
    save_total_limit: int = setting(3, "output", "checkpoints kept", positive=True)
    wandb: bool = setting(True, "output", "log to Weights & Biases (offline when not logged in)")
    wandb_project: str = setting("recursive-reasoner-sft", "output", "W&B project", metavar="NAME")
    wandb_run_name: str | None = setting(None, "output", "W&B run name", metavar="NAME")
    # fmt: on

    def samples_from_servers(self) -> bool:
        """Whether vLLM servers sample completions: never here, where completions are given."""
        return False

    def planner_prompt(self) -> dict[str, str]:
        """The settings that change the planner's prompt (json-plan)."""
        return {"planner_style": self.planner_style, "worker_context": self.worker_context}

    def validate(self) -> None:
        """Check every value.

        Raises:
            UserErrors: with all problems found, one line each.
        """
        problems = check_values(self)
        if problems:
            raise UserErrors(problems)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SupervisedArgs:
        """Settings as stored by `to_dict`; names this version does not know are dropped."""
        known = {spec.name for spec in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


# Values of `--demo`: the warm start of `make demo`. Its questions are like the GRPO demo's, from another seed.
SFT_DEMO: dict[str, Any] = {
    "base_model": DEMO["base_model"],
    "format": "json-plan",
    "dataset": DEMO["dataset"],
    "planner_style": DEMO["planner_style"],
    "lora_layers": DEMO["lora_layers"],
    "max_samples": 640,
    "max_seq_len": 256,
    "batch_size": 16,
    "grad_accum": 1,
    "lr": 1e-3,
    "seed": 7,
    "output_dir": "./demo_warm_start",
    "wandb": False,
}

RESUMABLE = {"save_steps", "save_total_limit", "output_dir", "wandb", "wandb_project", "wandb_run_name"}
