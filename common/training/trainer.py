"""TRL's GRPO trainer with this project's order of data, decoding on a CPU, and step clock.

This is the only module that uses private names of TRL, because TRL has no public ones for these parts of a step. They
are listed in `PRIVATE_NAMES`. A test reports the names that another version of TRL has moved.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DynamicCache, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer import utils as trl_utils
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from common.decoding.blocks import Kept
from common.decoding.decode import decode
from common.decoding.log_probs import (
    TOKENS_OF_A_PASS,
    Read,
    completion_log_probs,
    distinct_prompts,
    frozen_head,
    masked_log_probs,
    read_states,
    read_tokens,
    shared_cache,
    with_trl_head,
)
from common.decoding.packing import packed_linears
from common.models import untrained_layers
from common.processes import ranks
from common.reports.step_clock import StepClock
from common.runs.checkpoints import answers_file
from common.runs.storage import resume_command
from common.training.records import WithoutCard
from common.workers.frozen import FrozenBase
from common.workers.local import FrozenWorker, inference
from common.workers.rollouts import PolicyCheck, RunStoppedError, ServedPlanner

# Private methods of `GRPOTrainer` that this module overrides, with the parameters that it relies on.
PRIVATE_NAMES = {
    "_prepare_inputs": ("generation_batch",),
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": (
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
    ),
    "_get_train_sampler": ("dataset",),
    "_generate_single_turn": ("prompt_ids",),
}  # fmt: skip


def compact_fused_head() -> None:
    """Let TRL's fused head score only the completion tokens, also on a CPU.

    TRL does so only where Triton runs; elsewhere the head also scores every prompt and padding position. The replaced
    function is used only by the fused head, for this choice.
    """
    trl_utils._use_triton = lambda device: True  # type: ignore[attr-defined]


class EpochSampler(RepeatSampler):
    """TRL's sampler, but with an order that depends only on the seed and the epoch.

    TRL's sampler continues the random generator of the epoch before. A run resumed in its second epoch would then
    repeat the order of the first epoch.
    """

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate calls this before each epoch."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins. Otherwise the order of the first epoch could repeat.

    With several processes, and in a resumed run, accelerate does not tell it (docs/architecture.md).
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch; the Trainer calls this before it iterates over the data."""
        self._sampler.set_epoch(int(state.epoch or 0))


class PlannerTrainer(WithoutCard, GRPOTrainer):
    """`GRPOTrainer` with a data order that survives a resume in any epoch, and with fast rollouts on a CPU.

    Args:
        clock: measures the parts of a step, which are added to the step's log.
        frozen: logits of the base model before the trainer wrapped it.
        cpu_dtype: "bfloat16" for rollouts, rewards and log-probabilities with bf16 products on a CPU.
        (the others): as in `GRPOTrainer`.
    """

    def __init__(
        self, *args: Any, clock: StepClock, frozen: FrozenBase, cpu_dtype: str = "float32", **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._clock = clock
        self.frozen = frozen
        self._planner: ServedPlanner | None = None
        self._policy_check: PolicyCheck | None = None
        self._served_base = ""
        self._gap: dict[str, float] = {}
        self._cpu_dtype = cpu_dtype
        self._compares = True  # compare log-probabilities of the first rollouts with those of the training step
        self._log_probs: torch.Tensor | None = None  # of the micro-batch in training, (B, T)
        self._agreement: dict[str, float] = {}
        self._kept: Kept | None = None  # what went into the first layer in training while the rollouts were made
        self.worker: FrozenWorker | None = None  # its cached answers are stored in each checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model. In a checkpoint (`_internal_call`), the worker's cached answers are saved too."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.worker is not None:
            self.worker.save_answers(answers_file(Path(output_dir), self.accelerator.process_index))

    def sample_from(self, planner: ServedPlanner, check: PolicyCheck, base: str) -> None:
        """Take rollouts from servers, and stop the run if another policy generated them.

        Call it after construction, because TRL would otherwise start or look for its own vLLM. TRL corrects for the
        difference between the servers' and the trainer's log-probabilities (importance sampling) as usual.

        Args:
            planner: client of the servers.
            check: limit for the difference of log-probabilities.
            base: name of the base model on the servers.
        """
        self._planner, self._policy_check, self._served_base = planner, check, base
        self.use_vllm, self.vllm_mode = True, "server"
        self.vllm_generation: Any = planner
        self._compares = False  # with servers, TRL compares on every step
        self._last_loaded_step = -1

    def save_for_server(self, folder: Path) -> None:
        """Write only the present adapter to a folder."""
        model: Any = self.accelerator.unwrap_model(self.model)
        # With "auto", PEFT would ask the Hub whether the base model's vocabulary was resized.
        model.save_pretrained(
            folder, safe_serialization=True, save_embedding_layers=False, selected_adapters=["default"]
        )

    def train(self, *args: Any, **options: Any) -> Any:
        """Train; the clock starts with the first step.

        Raises:
            RunStoppedError: if the servers fail or use another policy. A checkpoint is saved first.
        """
        self._clock.restart()
        try:
            if self._planner is not None and self._policy_check is not None and self.accelerator.is_main_process:
                self._check_base(self._planner, self._policy_check, self._served_base)
            return super().train(*args, **options)
        except RunStoppedError as error:
            raise RunStoppedError(f"{error}; {self._save_and_say_how_to_go_on()}", exit_code=error.exit_code) from error
        finally:
            if self._planner is not None and self.accelerator.is_main_process:
                self._planner.close()

    def _save_and_say_how_to_go_on(self) -> str:
        """Save a checkpoint of the finished steps. Every process must call it, and between two optimiser updates."""
        output_dir, step = str(self.args.output_dir), self.state.global_step
        if step == 0:
            return "there is no step to save"
        if not (Path(output_dir) / f"checkpoint-{step}").is_dir():
            self._save_checkpoint(self.model, trial=None)
        return f"step {step} is saved, continue with {resume_command('grpo_training.py', Path(output_dir))}"

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """Forward and backward pass of a micro-batch; the first of a generation batch also generates that batch."""
        self._clock.begin()
        with self._clock.part("gradient_seconds", without=["inputs"]):
            loss = super().training_step(*args, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # otherwise its time would be added to the next part that waits for the GPU
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with self._clock.part("inputs"):
            return super()._prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        model, args = self.accelerator.unwrap_model(self.model), self.args
        assert isinstance(args, GRPOConfig)
        rows = 0 if self.use_vllm else len(inputs)  # servers generate, so nothing is generated here
        # Packed once for rollouts and reward together, and freed before gradients need the memory.
        with packed_linears(model, rows=rows, steps=args.max_completion_length or 0, cpu_dtype=self._cpu_dtype):
            scored = super()._generate_and_score_completions(inputs)
        if self._policy_check is not None:
            self._check_policy(scored, self._policy_check)
        return scored

    def _check_policy(self, scored: dict[str, Any], check: PolicyCheck) -> None:
        """Compare the servers' log-probabilities of B completions of T tokens with the trainer's, in all processes."""
        sampled = scored["sampling_per_token_logps"]  # (B, T), nan if the server reported none
        gap = (scored["old_per_token_logps"] - sampled).abs().float()
        gap = gap[scored["completion_mask"].bool() & ~torch.isnan(sampled)]
        largest = gap.max() if len(gap) else gap.sum()
        failed = sum(error is not None for error in self._planner.errors) if self._planner is not None else 0
        here = torch.stack([gap.sum(), torch.full_like(largest, len(gap)), largest, torch.full_like(largest, failed)])
        every: Any = self.accelerator.gather(here)  # (4 × processes)
        total, count, most, masked = every.view(-1, 4).unbind(dim=1)
        mean = float(total.sum() / count.sum().clamp(min=1))  # count is 0 if all completions were cut off and masked
        self._gap = {
            "served_policy_gap/mean": mean,
            "served_policy_gap/max": float(most.max()),
            "rollout_failures": float(masked.sum()),
        }
        step = self.state.global_step + 1
        # TRL logs the mean of the processes' means, but the processes have unequal numbers of tokens.
        self._metrics["train"]["sampling/sampling_logp_difference/mean"][-1] = mean
        check.check(mean, float(most.max()), f"the completions of step {step} are not the trained adapter's")

    def _check_base(self, planner: ServedPlanner, check: PolicyCheck, base: str) -> None:
        """Compare the servers' base model, which is also the worker, with the local one, on one prompt."""
        args, rows = self.args, self.train_dataset
        assert isinstance(args, GRPOConfig) and isinstance(rows, Dataset)
        prompt = self._tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=False)
        for rollout in planner.sample_base(base, prompt):
            ids = torch.tensor([[*prompt, *rollout.ids]], device=self.accelerator.device)
            unwrapped = self.accelerator.unwrap_model(self.model)
            with inference(unwrapped, adapter=False) as model, self.accelerator.autocast():
                logits = model(input_ids=ids, logits_to_keep=len(rollout.ids) + 1).logits[0, :-1]  # (T, V)
            scores = torch.log_softmax(logits.float() / args.temperature, dim=-1)
            own = scores.gather(1, ids[0, len(prompt) :, None])[:, 0]
            told = torch.tensor([float("nan") if value is None else value for value in rollout.logprobs])
            gap = (own.cpu() - told).abs()
            check.check(float(gap.mean()), float(gap.max()), f"the worker {base} on the server is not --base-model")

    def compute_loss(self, model: Any, inputs: Any, *others: Any, **options: Any) -> Any:
        """GRPO's loss. On a CPU, the first step also compares rollouts and training.

        Both compute log-probabilities of the same tokens. Their ratio is 1 on average if both use the same policy.
        Without TRL's vLLM nothing corrects for a difference. So the difference and the ratio, over the tokens of all
        processes, are logged once, under TRL's names for importance sampling.
        """
        loss = super().compute_loss(model, inputs, *others, **options)
        sampled = inputs.get("sampling_per_token_logps")
        if self._compares and sampled is not None and self._log_probs is not None and not self._agreement:
            differences = (self._log_probs - sampled)[inputs["completion_mask"] == 1]
            every = torch.tensor(ranks.gathered(differences.tolist()))
            ratios = every.exp()
            self._agreement = {
                "sampling/sampling_logp_difference/mean": every.abs().mean().item(),
                "sampling/sampling_logp_difference/max": every.abs().max().item(),
                "sampling/importance_sampling_ratio/mean": ratios.mean().item(),
                "sampling/importance_sampling_ratio/min": ratios.min().item(),
                "sampling/importance_sampling_ratio/max": ratios.max().item(),
            }
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> Any:
        """Log-probabilities of B completions; a prompt that several of them share is run once.

        The G completions of a group share their prompt, which is often the longer part. The gradient of all of them
        flows through one copy of the prompt's keys and values instead of G. Columns that are padding in every row of
        this micro-batch are not computed (`docs/performance.md`).

        Returns:
            Log-probabilities and entropies (nats; None unless asked for), each (B, `logits_to_keep`), and TRL's
            auxiliary loss of a mixture of experts (None without one).
        """
        if any(value is not None and value is not False for value in others.values()):  # images or an auxiliary loss
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )
            self._log_probs = found[0].detach()
            return found
        width = input_ids.shape[1]
        used = attention_mask.any(dim=0).nonzero().flatten().tolist()
        first, end = used[0], max(used[-1], width - logits_to_keep) + 1
        ids, mask, kept = input_ids[:, first:end], attention_mask[:, first:end], logits_to_keep - (width - end)
        shared = distinct_prompts(ids, mask, ids.shape[1] - kept - 1)
        whole = batch_size is None or batch_size >= len(ids)
        cache = shared_cache(self)
        if whole and len(shared[0]) < len(ids) and cache is not None:
            base = self.accelerator.unwrap_model(self.model).get_base_model()
            head, states = frozen_head(base), None
            if head is None:
                read, score = with_trl_head(model)
            else:
                read = partial(read_tokens, base.base_model)
                if self._kept is not None and (states := self._kept.find(ids, mask)) is not None:
                    read = partial(read_states, base.base_model, self._kept.first)
                score = partial(self._with_own_head, head, read)
            with self.accelerator.autocast():
                # On a GPU padding is cheaper than another pass over a micro-batch.
                cost = ids.numel() if torch.cuda.is_available() else TOKENS_OF_A_PASS
                own = head is not None
                parts = completion_log_probs(
                    read, shared, ids, mask, cache, score, cost, own_positions=own, states=states
                )
        else:
            parts = super()._get_per_token_logps_and_entropies(model, ids, mask, kept, batch_size, True)[:2]
        log_probs, entropies = (torch.nn.functional.pad(part, (0, width - end)) for part in parts)
        self._log_probs = log_probs.detach()
        return log_probs, entropies if compute_entropy else None, None

    def _with_own_head(
        self,
        head: torch.Tensor,
        read: Read,
        inputs: torch.Tensor,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of all real tokens (B, T) except each row's first, and entropies, each (B, T − 1)."""
        hidden = read(inputs, mask, cache)
        wanted = mask[:, 1 - tokens.shape[1] :] == 1
        temperature: float = self.temperature
        dtype: torch.dtype = getattr(torch, self._cpu_dtype)
        log_probs, entropies, _ = masked_log_probs(hidden[:, :-1], head, tokens[:, 1:], wanted, temperature, dtype)
        return log_probs, entropies

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step with the seconds of its parts. The first step also logs how well rollouts and training agree."""
        if "loss" in logs:
            logs.update(self._clock.take())
            logs.update(self._gap)
            if self._compares:
                logs.update(self._agreement)
                self._compares = False
        super().log(logs, start_time)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        args = self.args
        assert isinstance(args, GRPOConfig)
        # TRL sets these when it builds the config, although their types allow None.
        group: int = self.num_generations or 1
        assert args.generation_batch_size is not None and args.steps_per_generation is not None
        sampler = EpochSampler(
            data_source=dataset or self.train_dataset,  # type: ignore[arg-type]
            mini_repeat_count=group,
            batch_size=args.generation_batch_size // group,
            repeat_count=self.num_iterations * args.steps_per_generation,
            shuffle=bool(args.shuffle_dataset),
            seed=args.seed,
        )
        self.add_callback(SetEpoch(sampler))
        return sampler

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **options: Any) -> Any:
        """Completions of B prompts. On a CPU `common.decoding` makes them, in a third of the time of `generate`."""
        with self._clock.part("planner_seconds"):
            return self._timed_single_turn(prompt_ids, *others, **options)

    def _timed_single_turn(self, prompt_ids: list[list[int]], *others: Any, **options: Any) -> Any:
        args = self.args
        assert isinstance(args, GRPOConfig)
        if self.use_vllm or torch.cuda.is_available():
            return super()._generate_single_turn(prompt_ids, *others, **options)
        log_probs: list[list[float]] | None = [] if self._compares else None
        base = self.accelerator.unwrap_model(self.model).get_base_model()
        depth = 0 if frozen_head(base) is None or shared_cache(self) is None else untrained_layers(base.base_model)
        self._kept = None  # frees the states of the step before
        if depth:
            most = max(map(len, prompt_ids)) + (args.max_completion_length or 0)
            self._kept = Kept(base.base_model.layers, depth, len(prompt_ids), most, base.config.hidden_size)
        with inference(self.accelerator.unwrap_model(self.model), adapter=True) as model:
            completions = decode(
                model,
                prompt_ids,
                max_new_tokens=args.max_completion_length or 0,
                eos_ids=frozenset(self.eos_token_ids),
                pad_id=self._tokenizer.pad_token_id,
                temperature=args.temperature,
                top_p=args.top_p,
                log_probs=log_probs,
                kept=self._kept,
            )
        if self._kept is not None:
            self._kept.name(
                [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completions, strict=True)]
            )
        return completions, log_probs
