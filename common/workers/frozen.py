"""Whether the worker is what it is said to be: the base model, not changed by an adapter or by training.

With the adapter switched off, a model must give the very logits that its base gave before it was wrapped. What an
adapter does to the base beside adding to it (initialisations that subtract from the weights, trained biases,
embeddings of its own) shows here, whatever its config says.
"""

from __future__ import annotations

from typing import Any

from common import prompts
from common.errors import UserError
from common.workers.local import inference

POSITIONS = 8  # the last ones of each prompt: they depend on all before them, and a vocabulary is wide
# Same weights and same prompts give the same logits, bit by bit, wherever the same kernels run. Another kernel (a
# wrapper that moved the weights) sums in another order: so many units of rounding are let pass, of the largest logit.
ROUNDINGS = {"float32": 64, "float16": 4, "bfloat16": 4}


class FrozenBase:
    """The base model's logits on a few fixed prompts, and how far a model with its adapter off lies from them.

    Args:
        base: the base model, before anything wraps it.
        tokenizer: of the model, with a chat template.
    """

    def __init__(self, base: Any, tokenizer: Any) -> None:
        import torch

        texts = prompts.render_all(tokenizer, prompts.sample_requests("full", "instruct"))
        self._asked: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        self._expected = self._logits(base)
        dtype = self._expected[0].dtype
        largest = max(float(logits.abs().max()) for logits in self._expected)
        self.tolerance = ROUNDINGS[str(dtype).removeprefix("torch.")] * torch.finfo(dtype).eps * largest
        self._found: dict[int, float] = {}

    def measure(self, model: Any, *, step: int, adapter_path: str | None) -> None:
        """Compare now, and remember it for the run's record.

        Args:
            model: the one that training goes on with.
            step: at which this is.
            adapter_path: the adapter that training started from, to be named where it is to blame.

        Raises:
            UserError: where the logits are not the base model's.
        """
        self._found[step] = self.largest_difference(model)
        if self._found[step] <= self.tolerance:
            return
        told = (
            "with the adapter switched off the model is not its base model (largest logit difference "
            f"{self._found[step]:.3g})"
        )
        if step == 0 and adapter_path is not None:
            raise UserError(
                f"--adapter-path {adapter_path}: {told}, so there would be no frozen worker: it changes weights of the "
                "base; start from an adapter that only adds to them"
            )
        raise UserError(
            f"{told} at step {step}, so the worker was not frozen: the adapter of this run is not saved (its "
            "checkpoints are); report this as a bug",
            exit_code=1,
        )

    def largest_difference(self, model: Any) -> float:
        """Over all prompts and positions, adapter off; infinite where a logit is not a number."""
        import torch

        apart = 0.0
        for expected, found in zip(self._expected, self._logits(model), strict=True):
            distance = (expected.double() - found.double()).abs()
            apart = max(apart, float(torch.nan_to_num(distance, nan=torch.inf).max()))
        return apart

    def record(self) -> dict[str, Any]:
        """What `training_config.json` says about it."""
        apart = max(self._found.values())
        return {
            "worker_equals_base": apart <= self.tolerance,
            "largest_logit_difference": apart,
            "tolerance": self.tolerance,
            "compared_at_steps": sorted(self._found),
        }

    def _logits(self, model: Any) -> list[Any]:
        """(POSITIONS, V) of each prompt, on the CPU."""
        import torch

        with inference(model, adapter=False) as inner:
            return [
                inner(input_ids=torch.tensor([ids], device=inner.device), use_cache=False, logits_to_keep=POSITIONS)
                .logits[0, -POSITIONS:]
                .cpu()
                for ids in self._asked
            ]
