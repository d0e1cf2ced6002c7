"""The temporary folder of a merge, in the same folder as its target, and what a killed merge has left in it."""

from __future__ import annotations

import re
from pathlib import Path

from common.runs.files import remove

MODEL, REPLACED = "model", "replaced"  # folders in it: the new model, and the old model that it replaces


def workplace_prefix(target: Path) -> str:
    """Beginning of the name of a target's temporary folders; no other target has the same."""
    return f".merging-{target.name}-"


def remove_unfinished_merges(target: Path) -> None:
    """Remove the temporary folders of killed merges into this target. Call it only while the target is locked.

    A merge may be killed after it moved the old model away and before the new one is in place. Then the old model is
    moved back.
    """
    if not target.parent.is_dir():
        return
    name = re.compile(re.escape(workplace_prefix(target)) + "[a-z0-9_]{8}")
    for folder in target.parent.iterdir():
        if name.fullmatch(folder.name):
            if (folder / REPLACED).exists() and not target.exists():
                (folder / REPLACED).rename(target)
            remove(folder)
