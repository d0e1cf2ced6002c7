"""Keys to plant in tests, and a search for their traces. It shares no code with the module that hides keys."""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

PART = 8
# Split in two, so that a search of the repository for keys does not report them.
OPENAI = "sk-" + "PLANTED-a9f8e7d6c5b4+/Zq42=="
HUB = "hf_" + "PLANTEDkQ7wE3rT9yU1iO5pA2sD"
WANDB = "local-b7c1d2e3f4a5968778695a4b3c2d1e0f9a8b7c6d"


def found(key: str, text: str) -> set[str]:
    """Parts of a key (8 characters or more) that a text shows; escaped, quoted and encoded forms count too."""
    parts = {key[start : start + PART] for start in range(len(key) - PART + 1)}
    readings = [text, unquote(text), html.unescape(text), text.replace("\\", ""), *_decoded(text)]
    return {part for part in parts if any(part in reading for reading in readings)}


def _decoded(text: str) -> Iterator[str]:
    """Decoded forms of all base64 and hexadecimal in a text."""
    for word in re.findall(r"[A-Za-z0-9+/_-]{11,}", text):
        plain = word.translate(str.maketrans("-_", "+/"))
        for start in range(4):
            piece = plain[start : start + (len(plain) - start) // 4 * 4]
            yield base64.b64decode(piece).decode("latin-1")
        for start in range(2):
            try:
                yield binascii.unhexlify(word[start : start + (len(word) - start) // 2 * 2]).decode("latin-1")
            except binascii.Error:
                break


def everything(folder: Path, *printed: str) -> str:
    """Everything printed, and all files below a folder, as one text."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    # Weights and pictures are left out: any bytes look like base64 of something.
    texts = [path for path in files if path.suffix not in (".safetensors", ".png", ".pt", ".bin")]
    return "\n".join([*printed, *(path.read_bytes().decode("latin-1") for path in texts)])


def answers(path: Path) -> list[dict]:
    """The records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
