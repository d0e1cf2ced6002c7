"""Greedy answers that a worker remembers, also beyond a stopped run.

A checkpoint holds them. In bf16 an answer can depend on the other prompts of its batch (docs/performance.md). A
resumed run without these answers would batch other prompts than an uninterrupted run, and could end with another
adapter.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import astuple
from pathlib import Path

from common.generation import Generation
from common.runs.files import read_json, write_json


class AnswerMemory:
    """Answers by prompt; beyond `size` of them the least recently used one is dropped first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: OrderedDict[str, Generation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, prompt: str) -> Generation | None:
        """The answer to a prompt, which counts as used now, or None."""
        if prompt in self._answers:
            self._answers.move_to_end(prompt)
        return self._answers.get(prompt)

    def add(self, prompt: str, answer: Generation) -> None:
        """Remember an answer; one that failed is not, so that its prompt is tried again."""
        if answer.error is None:
            self._answers[prompt] = answer
        while len(self._answers) > self._size:
            self._answers.popitem(last=False)

    def save(self, path: Path) -> None:
        """Write all answers, least recently used first.

        Raises:
            OSError: where the file cannot be written.
        """
        write_json(path, {"answers": [[prompt, *astuple(answer)] for prompt, answer in self._answers.items()]})

    def load(self, path: Path) -> None:
        """Take the answers that `save` wrote; nothing happens where there is no such file (an older checkpoint)."""
        for prompt, *answer in (read_json(path) or {}).get("answers", ()):
            self.add(prompt, Generation(*answer))
