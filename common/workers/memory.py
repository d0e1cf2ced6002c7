"""The cache of a worker's greedy answers, which checkpoints store too.

In bf16 an answer can depend on the other prompts in its batch (docs/performance.md). A resumed run without the cached
answers would batch other prompts than an uninterrupted run. So it could end with another adapter.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import astuple
from pathlib import Path

from common.generation import Generation
from common.runs.files import read_json, write_json


class AnswerMemory:
    """Answers by prompt.

    Args:
        size: number of answers that are kept; the least recently used is dropped first.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: OrderedDict[str, Generation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, prompt: str) -> Generation | None:
        """The answer to a prompt, or None. It then counts as the most recently used one."""
        if prompt in self._answers:
            self._answers.move_to_end(prompt)
        return self._answers.get(prompt)

    def add(self, prompt: str, answer: Generation) -> None:
        """Keep an answer. A failed one is not kept, so that its prompt is tried again."""
        if answer.error is None:
            self._answers[prompt] = answer
        while len(self._answers) > self._size:
            self._answers.popitem(last=False)

    def save(self, path: Path) -> None:
        """Write all answers, least recently used first.

        Raises:
            OSError: if the file cannot be written.
        """
        write_json(path, {"answers": [[prompt, *astuple(answer)] for prompt, answer in self._answers.items()]})

    def load(self, path: Path) -> None:
        """Add the answers in a file of `save`. Nothing happens if there is no such file (an older checkpoint)."""
        for prompt, *answer in (read_json(path) or {}).get("answers", ()):
            self.add(prompt, Generation(*answer))
