"""Does a merged model predict the same as before merging? This is measured on planner prompts, before any upload.

The reference is the base model with its adapter on, called "adapter on base". It writes greedy plans; then both models
read each prompt with that plan, and their logits are compared at every token of the plan. The merged model, loaded
back from disk, also writes its own plans.

Two more figures are reported: how much the adapter changes the base model at all, and which share of its update the
saved weights still hold. Rounding to bf16 can erase a small update, and the merged model is then the base model again.
The limits are absolute, so a merge can pass although its error is larger than the effect of an adapter that changes
very little; the table then says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import prompts
from common.errors import UserError
from common.merging.report import read_report
from common.runs.files import sha256

if TYPE_CHECKING:
    import torch


REPORT = "certification.json"
EXIT_CODE = 4
QUESTIONS = (
    "Ann has 3 marbles, Ben has 5, Cleo has 2 and Dan has 4. How many marbles do they have in all?",
    "A bakery sells 12 rolls in the morning and twice as many in the afternoon. How many rolls does it sell?",
    "Ira has 4 pens, Joy has 1, Kit has 3 and Lea has 5. How many pens do they have in all?",
    "A ticket costs 8 dollars and a drink 3 dollars. How much do 5 tickets and 2 drinks cost?",
    "Mia reads 15 pages a day. After 6 days she has 40 pages left. How many pages does the book have?",
    "A tank holds 240 litres. A pump fills 16 litres a minute, a leak loses 4. How many minutes until it is full?",
    "Noa is 7 years older than Pat. In 5 years their ages will add up to 41. How old is Noa now?",
    "What is 17 + 25?",
)
MAX_PLAN_TOKENS = 96


@dataclass(frozen=True)
class Tolerance:
    """How much a merged model may differ. Logits and KL divergences are in nats, shares in [0, 1].

    In fp32 both models compute the same sums in another order. In 16 bits both round every activation, and the merged
    model rounds its weights too (relative error 2⁻⁹ for bf16, 2⁻¹² for fp16).

    Attributes:
        max_logit: largest difference of one logit.
        mean_kl: mean KL divergence over the tokens.
        equal_tokens: least share of tokens at which both models' most likely token is the same.
        equal_plans: least share of plans that are the same.
        update_kept: least share of the adapter's update in the saved weights.
    """

    max_logit: float
    mean_kl: float
    equal_tokens: float
    equal_plans: float
    # For 16-bit weights: below this share, rounding has erased what was learned (docs/results.md).
    update_kept: float = 0.9


TOLERANCES = {
    "float32": Tolerance(max_logit=0.02, mean_kl=1e-6, equal_tokens=0.999, equal_plans=1.0),
    "float16": Tolerance(max_logit=0.5, mean_kl=1e-3, equal_tokens=0.98, equal_plans=0.75),
    "bfloat16": Tolerance(max_logit=2.0, mean_kl=1e-2, equal_tokens=0.95, equal_plans=0.5),
}


@dataclass
class Evidence:
    """The outputs of one model: P plans as token ids, of T tokens each, and the logits (T, V) that predict them."""

    ids: list[list[int]]
    logits: list[torch.Tensor]


@dataclass
class Difference:
    """Distance between two models' predictions of the same tokens.

    Attributes:
        max_logit: largest difference of one logit (nats).
        mean_logit: mean difference of the logits (nats).
        mean_kl: mean over tokens of the KL divergence of the second model from the first (nats).
        max_kl: largest of these divergences (nats).
        equal_tokens: share of tokens in [0, 1] at which both models' most likely token is the same.
        positions: number of tokens compared.
    """

    max_logit: float
    mean_logit: float
    mean_kl: float
    max_kl: float
    equal_tokens: float
    positions: int


@dataclass
class Certificate:
    """Comparison of adapter on base with the merged model, and the tolerance that was applied.

    Attributes:
        difference: merged model against adapter on base.
        adapter_effect: base model alone against adapter on base.
        equal_plans: number of prompts for which both wrote the same plan.
        plans: per prompt, both plans as text.
        update_kept: share of the adapter's update that the saved weights hold.
        dtype: of the saved weights.
        tolerance: the limits.
        problems: what exceeds the limits, one line each.
    """

    difference: Difference
    adapter_effect: Difference
    equal_plans: int
    plans: list[dict[str, Any]]
    update_kept: float | None  # None: the update is zero in all layers
    dtype: str
    tolerance: Tolerance
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything is within the tolerance."""
        return not self.problems

    @property
    def learned_nothing(self) -> bool:
        """Whether the adapter does not change the base model."""
        return self.update_kept is None and self.adapter_effect.max_logit == 0

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON-ready values."""
        return {"passed": self.passed, "learned_nothing": self.learned_nothing, **asdict(self)}


def planner_prompts(tokenizer: Any, style: str) -> list[list[int]]:
    """The prompts of the comparison as token ids, in the wording that the planner was trained with.

    Args:
        tokenizer: of the planner.
        style: see `common.prompts.planner_messages`.
    """
    texts = prompts.render_all(tokenizer, [prompts.planner_messages(question, style) for question in QUESTIONS])
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def write_plans(model: Any, tokenizer: Any, asked: Sequence[Sequence[int]], *, adapter: bool) -> list[list[int]]:
    """Write a greedy plan for each of P prompts, with the adapter on or off.

    Returns:
        P plans as token ids, end-of-sequence token included.
    """
    from common.decoding.decode import decode
    from common.workers.local import end_token_ids, inference

    with inference(model, adapter=adapter) as inner:
        return decode(
            inner,
            asked,
            max_new_tokens=MAX_PLAN_TOKENS,
            eos_ids=end_token_ids(inner, tokenizer),
            pad_id=tokenizer.pad_token_id,
        )


def predictions(
    model: Any, asked: Sequence[Sequence[int]], plans: Sequence[Sequence[int]], *, adapter: bool
) -> list[torch.Tensor]:
    """The logits that predict each token of the given plans: one tensor (T, V) per prompt, on the CPU.

    Args:
        model: a causal LM, or a `PeftModel`.
        asked: P prompts as token ids.
        plans: P plans as token ids.
        adapter: whether the adapter is on.
    """
    import torch

    from common.workers.local import inference

    found = []
    with inference(model, adapter=adapter) as inner:
        for prompt, plan in zip(asked, plans, strict=True):
            ids = torch.tensor([[*prompt, *plan[:-1]]], device=inner.device)
            logits = inner(input_ids=ids, use_cache=False, logits_to_keep=len(plan)).logits[0]
            found.append(logits[-len(plan) :].cpu())
    return found


def difference(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Compare two models' logits token by token.

    The KL divergence is KL(p‖q) = Σ p (log p − log q) over the vocabulary, with p from the reference. Source:
    Kullback and Leibler 1951, https://doi.org/10.1214/aoms/1177729694.

    Args:
        reference: logits (T, V) per prompt.
        other: logits of the same shapes.
    """
    import torch

    largest, total, kls, equal = 0.0, 0.0, [], []
    count = 0
    for left, right in zip(reference, other, strict=True):
        distance = (left.double() - right.double()).abs()
        largest = max(largest, float(distance.max()))
        total += float(distance.sum())
        count += distance.numel()
        log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (left, right))
        kls.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
        equal.append(left.argmax(dim=-1) == right.argmax(dim=-1))
    kl = torch.cat(kls).clamp(min=0)
    return Difference(
        max_logit=largest,
        mean_logit=total / count,
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        equal_tokens=float(torch.cat(equal).double().mean()),
        positions=len(kl),
    )


def certify(
    tokenizer: Any,
    reference: Evidence,
    base_logits: Sequence[torch.Tensor],
    merged: Evidence,
    *,
    update_kept: float | None,
    dtype: str,
) -> Certificate:
    """Compare the merged model with adapter on base, and list what exceeds the tolerance.

    Args:
        tokenizer: of both models.
        reference: outputs of adapter on base.
        base_logits: logits of the base model alone, on the reference's plans.
        merged: plans of the merged model, and its logits on the reference's plans.
        update_kept: share of the adapter's update that the saved weights hold; None if the update is zero.
        dtype: of the saved weights; it decides the tolerance.
    """
    plans = []
    for question, expected, found in zip(QUESTIONS, reference.ids, merged.ids, strict=True):
        left, right = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (expected, found))
        plans.append({"question": question, "equal": expected == found, "adapter": left, "merged": right})
    certificate = Certificate(
        difference=difference(reference.logits, merged.logits),
        adapter_effect=difference(reference.logits, base_logits),
        equal_plans=sum(plan["equal"] for plan in plans),
        plans=plans,
        update_kept=update_kept,
        dtype=dtype,
        tolerance=TOLERANCES[dtype],
    )
    certificate.problems = _problems(certificate)
    return certificate


def _problems(found: Certificate) -> list[str]:
    """What exceeds the tolerance, one line each, with advice."""
    apart, limit = found.difference, found.tolerance
    wider = (
        "the adapter may touch weights that the model shares between layers, such as tied embeddings"
        if found.dtype == "float32"
        else "try --dtype float32"
    )
    checks = [
        (apart.max_logit <= limit.max_logit, f"largest logit difference {apart.max_logit:.3g} > {limit.max_logit:g}"),
        (apart.mean_kl <= limit.mean_kl, f"mean KL {apart.mean_kl:.3g} > {limit.mean_kl:g}"),
        (apart.equal_tokens >= limit.equal_tokens, f"equal tokens {apart.equal_tokens:.4f} < {limit.equal_tokens:g}"),
        (
            found.equal_plans >= limit.equal_plans * len(found.plans),
            f"equal plans {found.equal_plans} of {len(found.plans)} < {limit.equal_plans:g}",
        ),
        (
            found.update_kept is None or found.update_kept >= limit.update_kept,
            f"rounding to {found.dtype} keeps {found.update_kept or 0:.1%} of the adapter's update, "
            f"less than {limit.update_kept:.0%}",
        ),
    ]
    return [f"{message}: {wider}" for good, message in checks if not good]


# ------------------------------------------------------------------------------------------- the stored report


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a merged model, except the report and the model card, which are written later."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in (REPORT, "README.md"))
    return {name: sha256(folder / name) for name in names}


def merge_inputs(adapter: Path, base: str, **choices: Any) -> dict[str, Any]:
    """Everything that a merge depends on, to recognise a finished merge.

    A base model in a folder is described by its name and a digest of its files' names, sizes and times. Reading all
    of it would take as long as merging, and its path should not be published.

    Args:
        adapter: folder of the adapter.
        base: Hub id or folder of the base model.
        choices: settings that affect the result.
    """
    folder = Path(base).expanduser()
    origin: dict[str, Any] = {"base_model": base}
    if folder.is_dir():
        listed = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
        origin = {"base_model": folder.name, "base_files": hashlib.sha256(repr(listed).encode()).hexdigest()}
    return {
        **origin,
        "adapter_sha256": sha256(adapter / "adapter_model.safetensors"),
        "adapter_config_sha256": sha256(adapter / "adapter_config.json"),
        **choices,
    }


def finished_merge(folder: Path, inputs: dict[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """The report of a finished merge with the same inputs and unchanged files; None if one must be made.

    Args:
        folder: of the merged model.
        inputs: as `merge_inputs` returns them.
        overwrite: whether any merge in the folder is to be replaced.

    Raises:
        UserError: if the folder holds something else, another merge, or a merge that was changed since.
    """
    if folder.is_file():
        raise UserError(f"--local-save-path {folder} is a file: name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    report = read_report(folder / REPORT)
    if report is None:
        raise UserError(f"--local-save-path {folder} holds files that are no merge of this script: name another folder")
    if overwrite:
        return None
    found = report["inputs"]
    changed = [name for name, value in inputs.items() if found.get(name) != value]
    if changed:
        name = changed[0]
        raise UserError(
            f"--local-save-path {folder} holds another merge ({name} is {found.get(name)} there, {inputs[name]} here): "
            "replace it with --overwrite, or name another folder"
        )
    if report["files"] != file_hashes(folder):
        raise UserError(
            f"--local-save-path {folder} holds this merge, but its files were changed since they were certified: "
            "merge again with --overwrite"
        )
    return report
