"""All settings of a GRPO run: default, help text and checks.

`common.cli` builds the command line from these fields. A run stores them in `training_config.json`, where evaluation
and serving read them. Nothing heavy is imported here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from common.errors import UserError, UserErrors
from common.plans import MAX_SUBPROBLEM_CHARS, MAX_SUBPROBLEMS
from common.processes import ranks
from common.settings.fields import advice_problem, check_values, setting, url_problem
from common.settings.secrets import api_key_problem

PACKAGED_MODEL = "packaged/SmolLM2-135M-Instruct"


@dataclass(kw_only=True)
class TrainingArgs:
    """Settings of `grpo_training.py`. Lengths are in tokens, times in seconds; weights have no unit.

    The help text of each field documents it. GRPO: DeepSeekMath, arXiv:2402.03300. Loss types: arXiv:2503.14476 (DAPO)
    and arXiv:2503.20783 (Dr. GRPO). LoRA multiplies its update by lora_alpha / lora_r (arXiv:2106.09685). The KL
    penalty is estimated per token by exp(d) − d − 1, d = log π_reference − log π (joschu.net/blog/kl-approx.html).
    """

    # fmt: off
    base_model: str = setting("meta-llama/Llama-3.1-8B-Instruct", "model", "Hub id or folder of the base model (planner and frozen worker)", metavar="MODEL", local="name")
    adapter_path: str | None = setting(None, "model", "start from this LoRA adapter, such as a supervised one", metavar="DIR", local="path")
    use_4bit: bool | None = setting(None, "model", "base model in NF4 with double quantisation (default: 4-bit on a GPU, --cpu-dtype without)")
    cpu_dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "model", "number format of matrix products on a CPU. bfloat16 is faster, most of all in forward and backward; but where two tokens are almost equally likely, a greedy answer may then depend on the other prompts in its batch. auto: bfloat16 if the processor has instructions for it (AVX512-BF16, AMX) and weights are not quantised, else float32; with vLLM servers float32, because the check of who wrote the plans is most exact then. Not used on a GPU")
    lora_r: int = setting(16, "model", "LoRA rank", positive=True)
    lora_alpha: int = setting(32, "model", "LoRA scale numerator: the update is multiplied by alpha / r", positive=True)
    lora_dropout: float = setting(0.0, "model", "LoRA dropout; on a GPU, rollouts run in train mode, so it is noise on the policy too", fraction=True, below=1)
    lora_layers: int | None = setting(None, "model", "adapt only the last N layers (default: all)", positive=True)

    dataset: str = setting("openai/gsm8k", "data", "Hub id; or a .jsonl/.parquet file or folder with question and answer columns; or generated problems: generated:shares or reasoning-gym:TASK[?option=value&…]; or several of any of these in one question: multi:SOURCE[?parts=2-3&single=0.3&max_steps=3&kind=sum|chained]", local="name")
    dataset_config: str | None = setting("main", "data", "configuration of a Hub data set", metavar="NAME")
    dataset_split: str = setting("train", "data", "split to train on", metavar="NAME")
    max_samples: int = setting(1000, "data", "use at most this many questions", positive=True)

    lr: float = setting(1e-5, "training", "peak learning rate (AdamW)", positive=True, below=1)
    lr_schedule: Literal["constant", "linear", "cosine"] = setting("linear", "training", "learning rate after warm-up")
    warmup_steps: int = setting(0, "training", "steps of linear warm-up", minimum=0)
    batch_size: int = setting(1, "training", "completions per device and forward/backward pass", positive=True)
    grad_accum: int = setting(8, "training", "passes per optimiser step; batch-size × processes × grad-accum completions are generated per step", positive=True)
    max_steps: int = setting(500, "training", "optimiser steps", positive=True)
    num_iterations: int = setting(1, "training", "optimiser passes over each generated batch (μ in the GRPO paper)", positive=True)
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = setting("dapo", "training", "how token losses are averaged: dapo over all tokens of the generation batch; grpo within each completion, then over completions (as in the GRPO paper); bnpo over the tokens of a micro-batch; dr_grpo over a constant")
    epsilon: float = setting(0.2, "training", "the importance ratio is clipped to 1 ± epsilon", positive=True, fraction=True)
    mask_truncated: bool = setting(False, "training", "leave completions that were cut off out of the loss; without it they earn 0, as invalid plans do")
    beta: float = setting(0.0, "training", "weight of the KL penalty; its reference is the policy at the start: the adapter of --adapter-path, else the base model", minimum=0)
    scale_rewards: Literal["group", "batch", "none"] = setting("group", "training", "what advantages are divided by: the standard deviation within the group (GRPO), of the whole batch, or nothing (Dr. GRPO). With 'group', a group whose answers are all right turns its small differences in length and independence into full-size advantages")
    max_grad_norm: float = setting(1.0, "training", "gradients are clipped to this norm", positive=True)
    gradient_checkpointing: bool | None = setting(None, "training", "recompute activations to save memory (default: on a GPU only)")
    seed: int = setting(42, "training", "seed of initialisation, data order and sampling", minimum=0, below=2**32)

    num_generations: int = setting(4, "planner", "completions per question (the GRPO group, G)", minimum=2)
    temperature: float = setting(0.7, "planner", "sampling temperature of the planner", positive=True)
    top_p: float = setting(1.0, "planner", "nucleus sampling of the planner", positive=True, fraction=True)
    max_completion_length: int = setting(512, "planner", "longest plan, in tokens; a plan that is cut off is invalid", positive=True)
    max_subproblems: int = setting(MAX_SUBPROBLEMS, "planner", "a plan with more subproblems is invalid", positive=True)
    max_subproblem_chars: int = setting(MAX_SUBPROBLEM_CHARS, "planner", "a plan with a subproblem of more characters is invalid", positive=True)
    planner_style: Literal["full", "short"] = setting("full", "planner", "wording of the planner's system message; 'short' suits small fine-tuned models")

    worker_max_tokens: int = setting(256, "worker", "longest answer of the frozen worker to one prompt, in tokens", positive=True)
    worker_style: Literal["instruct", "worked", "few-shot"] = setting("instruct", "worker", "instruct: zero-shot instructions; worked: these and two solved word problems (for a question made of several, two such questions), for shorter answers of a small model; few-shot: turns of the demo's kind of problem")
    worker_context: Literal["question", "none"] = setting("question", "worker", "what a subproblem's prompt shows besides the subproblem: the whole question, or none of it, and then the planner is told to write parts that can be understood alone (few-shot never shows the question)")
    plan_to_worker: bool = setting(False, "worker", "show the worker the plan's text when it solves directly or combines; an answer from a plan that holds the known answer is then not rewarded as correct")
    worker_batch_tokens: int = setting(32768, "worker", "padded tokens (prompt and answer, on a CPU without what all prompts share) of one worker micro-batch; lower it if memory runs out", positive=True)
    worker_cache_size: int = setting(20000, "worker", "greedy answers remembered across steps; 0 remembers none", minimum=0)

    worker_url: str | None = setting(None, "worker", "use the base model of this OpenAI-compatible server as worker, instead of the planner's own weights without the adapter; the server's key: $OPENAI_API_KEY", metavar="URL")
    worker_model: str | None = setting(None, "worker", "name of that model on the server (default: the entry of /v1/models without a parent)", metavar="NAME")
    worker_timeout: float = setting(300.0, "worker", "seconds one attempt at one request to --worker-url may take", positive=True)

    vllm_url: str | None = setting(None, "vllm", "sample plans from the adapter on these vLLM servers, and use their base model as worker (docs/training.md shows a server's command); several addresses, separated by commas, share the prompts", metavar="URL[,URL…]")
    vllm_python: str | None = setting(None, "vllm", "start such a vLLM server on this machine for the time of the run, with this Python of an environment that has vLLM", metavar="FILE", local="path")
    vllm_port: int = setting(8100, "vllm", "port of the server that --vllm-python starts", positive=True)
    vllm_gpu_memory: float = setting(0.4, "vllm", "share of the GPU's memory for the server that --vllm-python starts", positive=True, fraction=True)
    vllm_adapter_dir: str | None = setting(None, "vllm", "folder for the adapter versions that the servers load; they must see it under the same path (default: vllm_adapters in --output-dir)", metavar="DIR", local="path")
    vllm_timeout: float = setting(600.0, "vllm", "seconds one attempt at one request to --vllm-url may take", positive=True)
    vllm_patience: float = setting(300.0, "vllm", "seconds that a server may be unreachable before its samples are left out of the loss (masked)", minimum=0)
    vllm_max_gap: float | None = setting(None, "vllm", "stop the run if log-probabilities of a server and of the trainer differ by more than this, in nats (default: 0.001 for every token if the trainer computes in fp32, else 0.1 for the mean over all tokens)", positive=True)

    correctness_weight: float = setting(1.0, "reward", "weight of a correct final answer", minimum=0)
    token_weight: float = setting(0.2, "reward", "weight of token efficiency, 1 − tokens / max-tokens", minimum=0)
    independence_weight: float = setting(0.3, "reward", "weight of the independence of the subproblems", minimum=0)
    max_tokens: int = setting(1000, "reward", "planner and worker tokens of one question at which token efficiency is 0 (the normaliser of the formula)", positive=True)
    format_weight: float = setting(0.0, "reward", "credit for nearly valid JSON in an invalid plan; 0 keeps the documented formula", minimum=0)
    gate_on_correct: bool = setting(False, "reward", "reward efficiency and independence only if the answer is correct")
    embedding_model: str = setting("sentence-transformers/all-MiniLM-L6-v2", "reward", "sentence encoder behind the independence score", metavar="MODEL", local="name")

    eval_samples: int = setting(0, "evaluation", "held-out questions for the scoreboard before and after training; 0: none", minimum=0)
    eval_dataset: str | None = setting(None, "evaluation", "source of the held-out questions (default: the test split of --dataset, or newly generated problems)", metavar="SOURCE", local="name")

    output_dir: str = setting("./grpo_planner_adapter", "output", "folder for all files of the run", metavar="DIR", local="path")
    save_steps: int = setting(50, "output", "steps between checkpoints", positive=True)
    save_total_limit: int = setting(3, "output", "checkpoints kept", positive=True)
    wandb: bool = setting(True, "output", "log to Weights & Biases (offline when not logged in)")
    wandb_project: str = setting("recursive-reasoner-grpo", "output", "W&B project", metavar="NAME")
    wandb_run_name: str | None = setting(None, "output", "W&B run name", metavar="NAME")
    # fmt: on

    def validate(self, *, world_size: int | None = None) -> None:
        """Check every value, and every rule between values, that needs neither a file nor a model.

        Args:
            world_size: number of processes (default: $WORLD_SIZE, or 1).

        Raises:
            UserErrors: with all problems found, one line each.
        """
        problems = check_values(self)
        if not problems:
            processes = world_size or ranks.world_size()
            problems += _divisibility_problem(self, processes)
            if self.correctness_weight + self.token_weight + self.independence_weight == 0:
                problems.append("all three reward weights are 0, so every reward would be: raise one of them")
            if self.format_weight and self.format_weight >= self.correctness_weight:
                problems.append(
                    f"--format-weight {self.format_weight:g} would pay an invalid plan as much as a correct "
                    f"answer (--correctness-weight {self.correctness_weight:g}): use a smaller one"
                )
            if self.worker_url is not None and (problem := url_problem(self.worker_url)) is not None:
                problems.append(f"--worker-url {problem}")
            asks_server = (self.worker_url or self.vllm_url or self.vllm_python) is not None
            if asks_server and (problem := api_key_problem()) is not None:
                problems.append(problem)
            if (problem := advice_problem(self.plan_to_worker, self.worker_style)) is not None:
                problems.append(problem)
            problems += _vllm_problems(self)
        if problems:
            raise UserErrors(problems)

    def samples_from_servers(self) -> bool:
        """Whether vLLM servers sample the plans: running ones, or one that this run starts."""
        return (self.vllm_url or self.vllm_python) is not None

    def planner_prompt(self) -> dict[str, str]:
        """The settings that change the planner's prompt."""
        return {"planner_style": self.planner_style, "worker_context": self.worker_context}

    def vllm_urls(self) -> list[str]:
        """The addresses in `--vllm-url`, one per server."""
        return [url.strip() for url in (self.vllm_url or "").split(",") if url.strip()]

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingArgs:
        """Settings as stored by `to_dict`; unknown names, from other versions, are dropped."""
        known = {spec.name for spec in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def _vllm_problems(args: TrainingArgs) -> list[str]:
    """Settings that cannot be combined with vLLM servers, one line each."""
    if args.vllm_url is None and args.vllm_python is None:
        return []
    problems = [f"--vllm-url {problem}" for url in args.vllm_urls() if (problem := url_problem(url)) is not None]
    if args.vllm_url is not None and not args.vllm_urls():
        problems.append("--vllm-url is empty: use http://HOST:PORT/v1")
    if len(set(args.vllm_urls())) < len(args.vllm_urls()):
        problems.append("--vllm-url names a server twice")
    if args.vllm_url is not None and args.vllm_python is not None:
        problems.append("--vllm-python starts a server, --vllm-url names one that runs: leave one of them out")
    if args.vllm_port > 65535:
        problems.append(f"--vllm-port {args.vllm_port}: a port is at most 65535")
    if args.worker_url is not None:
        problems.append("--vllm-url and --vllm-python serve the worker too: leave out --worker-url")
    if args.top_p < 1:
        problems.append(
            f"--top-p {args.top_p:g} does not go with vLLM: its log-probabilities would be those of the nucleus, the "
            "trainer's of the whole vocabulary: use --temperature"
        )
    if args.temperature > 2:
        problems.append(f"--temperature {args.temperature:g} does not go with vLLM, which samples at up to 2")
    if args.lora_dropout > 0:
        whose = "" if args.adapter_path is None else f" (in the adapter_config.json of {args.adapter_path})"
        problems.append(
            f"--lora-dropout {args.lora_dropout:g}{whose} does not go with vLLM: it serves the adapter without "
            "dropout, the trainer scores with it: use 0"
        )
    return problems


def check_plan_fits(args: TrainingArgs, prompt: int, context: int | None) -> None:
    """Refuse plans that may grow beyond the model's context.

    Args:
        args: settings of the run.
        prompt: tokens of the longest planner prompt.
        context: tokens that the model was made for; None if its config does not tell.

    Raises:
        UserError: with the lengths.
    """
    if context is not None and prompt + args.max_completion_length > context:
        raise UserError(
            f"--max-completion-length {args.max_completion_length}: with a prompt of {prompt} tokens a plan "
            f"leaves the model's context of {context}: lower it"
        )


def _divisibility_problem(args: TrainingArgs, processes: int) -> list[str]:
    """GRPO groups must fill a generation batch exactly. TRL checks this only after the model is loaded."""
    per_pass = args.batch_size * processes
    generation_batch = per_pass * args.grad_accum
    if generation_batch % args.num_generations == 0:
        return []
    step = args.num_generations // math.gcd(args.num_generations, per_pass)
    below = args.grad_accum // step * step
    choices = [str(value) for value in (below, below + step) if value > 0]
    where = f" × {processes} processes" if processes > 1 else ""
    return [
        f"--batch-size {args.batch_size}{where} × --grad-accum {args.grad_accum} = {generation_batch} completions "
        f"per step do not divide into groups of --num-generations {args.num_generations}: "
        f"use --grad-accum {' or '.join(choices)}, or another --num-generations"
    ]


# Values of `--demo`: a run for a laptop without GPU, network or account. Explicit flags override them.
DEMO: dict[str, Any] = {
    "base_model": PACKAGED_MODEL,
    "dataset": "generated:shares?people=6&low=1&high=5",
    "max_samples": 400,
    "output_dir": "./demo_adapter",
    "lora_layers": 10,
    "lr": 8e-5,
    "lr_schedule": "constant",
    "batch_size": 16,
    "grad_accum": 2,
    "max_steps": 12,
    "num_generations": 8,
    "scale_rewards": "batch",
    "temperature": 0.8,
    "max_completion_length": 64,
    "max_subproblems": 3,  # the few-shot worker combines three results and ignores a fourth
    "planner_style": "short",
    "worker_style": "few-shot",
    "worker_max_tokens": 96,
    "max_tokens": 300,
    "eval_samples": 100,
    "wandb": False,
}
# Settings that may change when a run is continued: none of them changes its data, its model or its reward.
RESUMABLE = {
    "max_steps", "save_steps", "save_total_limit", "output_dir", "wandb", "wandb_project", "wandb_run_name",
    "worker_batch_tokens", "worker_cache_size", "worker_url", "worker_timeout", "gradient_checkpointing",
    "vllm_url", "vllm_python", "vllm_port", "vllm_gpu_memory", "vllm_adapter_dir", "vllm_timeout", "vllm_patience", "vllm_max_gap",
    "eval_samples", "eval_dataset",
}  # fmt: skip
