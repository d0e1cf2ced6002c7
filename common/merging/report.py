"""Read the stored report of a merge (`certification.json`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import UserError
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
