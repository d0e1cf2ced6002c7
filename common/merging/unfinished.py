"""The temporary folder of a merge, in the same folder as its target, and what a killed merge has left in it."""

from __future__ import annotations

import re
from pathlib import Path

from common.merging.certificate import REPORT
from common.runs.files import remove, remove_unfinished

MODEL, REPLACED = "model", "replaced"  # folders in it: the new model, and the old model that it replaces


def workplace_prefix(target: Path) -> str:
    """Beginning of the name of a target's temporary folders; no other target has the same."""
    return f".merging-{target.name}-"


def remove_unfinished_merges(target: Path) -> None:
    """Remove what killed merges into this target have left. Call it only while the target is locked.

    That is their temporary folders, and in a finished merge the model card that was being written. A merge may be
    killed after it moved the old model away and before the new one is in place. Then the old model is moved back.
    """
    if not target.parent.is_dir():
        return
    name = re.compile(re.escape(workplace_prefix(target)) + "[a-z0-9_]{8}")
    for folder in target.parent.iterdir():
        if name.fullmatch(folder.name):
            if (folder / REPLACED).exists() and not target.exists():
                (folder / REPLACED).rename(target)
            remove(folder)
    if (target / REPORT).is_file():  # else the folder is not one of ours
        remove_unfinished(target)
