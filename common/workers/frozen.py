"""Check that the worker is the base model, unchanged by an adapter or by training.

With the adapter off, the model must give the same logits as its base model did before it was wrapped. The check finds
everything that an adapter does to the base model besides adding an update, whatever its config says: initialisations
that subtract from the weights, trained biases, embeddings of its own.
"""

from __future__ import annotations

from typing import Any

from common import prompts
from common.errors import UserError
from common.workers.local import inference

POSITIONS = 8  # last tokens of each prompt: they depend on all before them, and logits of all would be large
# The same kernels give bit-equal logits for the same weights and prompts. Other kernels (of a wrapper that moved the
# weights) sum in another order. So a difference of this many rounding units of the largest logit is allowed.
ROUNDINGS = {"float32": 64, "float16": 4, "bfloat16": 4}


class FrozenBase:
    """The base model's logits on a few fixed prompts, for comparison with a model whose adapter is off.

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
        """Compare the logits now, and store the result for the run's record.

        Args:
            model: the model in training.
            step: optimiser steps done.
            adapter_path: adapter from which training started, or None; named in the error.

        Raises:
            UserError: if the logits are not the base model's.
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
        """Largest difference of a logit over all prompts and positions, adapter off; infinite if one is NaN."""
        import torch

        apart = 0.0
        for expected, found in zip(self._expected, self._logits(model), strict=True):
            distance = (expected.double() - found.double()).abs()
            apart = max(apart, float(torch.nan_to_num(distance, nan=torch.inf).max()))
        return apart

    def record(self) -> dict[str, Any]:
        """The entries about this check in `training_config.json`."""
        apart = max(self._found.values())
        return {
            "worker_equals_base": apart <= self.tolerance,
            "largest_logit_difference": apart,
            "tolerance": self.tolerance,
            "compared_at_steps": sorted(self._found),
        }

    def _logits(self, model: Any) -> list[Any]:
        """Logits (POSITIONS, V) of each prompt, on the CPU."""
        import torch

        with inference(model, adapter=False) as inner:
            return [
                inner(input_ids=torch.tensor([ids], device=inner.device), use_cache=False, logits_to_keep=POSITIONS)
                .logits[0, -POSITIONS:]
                .cpu()
                for ids in self._asked
            ]
