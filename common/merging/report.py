"""Read the stored report of a merge (`certification.json`), and show its certificate as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.reports.tables import format_table
from common.runs.files import read_json

_PARTS = ("inputs", "files", "certificate")


def read_report(path: Path) -> dict[str, Any] | None:
    """The report of a finished merge; None if there is no file.

    Raises:
        UserError: if the file is not such a report.
    """
    report = read_json(path)
    if report is not None and not all(isinstance(report.get(name), dict) for name in _PARTS):
        raise UserError(f"{path} is no report of a merge: remove its folder, or name another one")
    return report


def certificate_table(certificate: dict[str, Any]) -> str:
    """A stored certificate as text for the terminal or the model card.

    A note is added if the adapter changes so little that the merge's error is larger.
    """
    apart, effect, limit = (certificate[name] for name in ("difference", "adapter_effect", "tolerance"))
    kept = certificate["update_kept"]
    plans = len(certificate["plans"])

    def figure(value: float) -> str:
        return f"{value:.2g}"

    rows: list[dict[str, object]] = [
        {
            "merged against adapter on base": title,
            "found": figure(apart[key]),
            "limit": figure(limit[key]) if key in limit else "-",
            "adapter against base": figure(effect[key]),
        }
        for key, title in (
            ("max_logit", "largest logit difference"),
            ("mean_logit", "mean logit difference"),
            ("mean_kl", "mean KL divergence (nats)"),
            ("max_kl", "largest KL divergence (nats)"),
        )
    ]
    for title, found, least, other in (
        (
            f"equal greedy tokens (of {apart['positions']})",
            f"{apart['equal_tokens']:.1%}",
            f"{limit['equal_tokens']:.1%}",
            f"{effect['equal_tokens']:.1%}",
        ),
        ("equal plans", f"{certificate['equal_plans']} of {plans}", f"{limit['equal_plans'] * plans:g}", "-"),
        (
            "update kept by the saved weights",
            "-" if kept is None else f"{kept:.2%}",
            f"{limit['update_kept']:.0%}",
            "-",
        ),
    ):
        rows.append(
            {"merged against adapter on base": title, "found": found, "limit": least, "adapter against base": other}
        )
    text = format_table(rows)
    if apart["mean_kl"] > effect["mean_kl"] and not certificate["learned_nothing"]:
        text += (
            f"\nnote: the merge's error (mean KL {figure(apart['mean_kl'])}) is larger than the adapter's effect "
            f"({figure(effect['mean_kl'])})"
        )
        if certificate["dtype"] != "float32":
            text += ": try --dtype float32"
    return text
