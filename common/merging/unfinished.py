"""The folder in which a merge is made, beside its target, and what a killed merge has left of it."""

from __future__ import annotations

import re
from pathlib import Path

from common.runs.files import remove

MODEL, REPLACED = "model", "replaced"  # in that folder: the new model, and the one whose place it takes


def workplace_prefix(target: Path) -> str:
    """How the name of a target's temporary folder begins; another target's begins with another one."""
    return f".merging-{target.name}-"


def remove_unfinished_merges(target: Path) -> None:
    """Remove what killed merges into this target have left; only while it is locked.

    A merge that was killed between moving the old model away and the new one in has left the old one there: it
    is put back.
    """
    if not target.parent.is_dir():
        return
    name = re.compile(re.escape(workplace_prefix(target)) + "[a-z0-9_]{8}")
    for folder in target.parent.iterdir():
        if name.fullmatch(folder.name):
            if (folder / REPLACED).exists() and not target.exists():
                (folder / REPLACED).rename(target)
            remove(folder)
