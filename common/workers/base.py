"""What the pipeline needs of a worker, whatever is behind it, and the three documented calls."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from common import prompts
from common.generation import Generation, WorkerStats
from common.prompts import Message

T = TypeVar("T")


class Worker(Protocol):
    """What the executor needs of a worker, whatever is behind it."""

    style: str

    def generate(self, requests: Sequence[Sequence[Message]]) -> list[Generation]:
        """Answer prompts, in order; one that cannot be answered carries its `error`."""

    def take_stats(self) -> WorkerStats:
        """The counts since the last call, which starts them anew."""


@runtime_checkable
class ConcurrentWorker(Worker, Protocol):
    """A worker that gains nothing from batches: each prompt is answered on its own, many at a time."""

    async def answer(self, request: Sequence[Message]) -> Generation:
        """Answer one prompt; `error` says why there is no answer."""

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run asynchronous work on this worker to its end."""


class WorkerCalls:
    """The three documented calls, thin views on the `generate` of the worker they are mixed into."""

    style: str
    generate: Callable[[Sequence[Sequence[Message]]], list[Generation]]

    def solve_subproblem(self, subproblem: str, question: str) -> Generation:
        """Answer one subproblem of a question."""
        return self.generate([prompts.subproblem_messages(subproblem, question, self.style)])[0]

    def combine_solutions(self, question: str, subproblems: Sequence[str], solutions: Sequence[str]) -> Generation:
        """Answer a question from its solved subproblems."""
        return self.generate([prompts.combine_messages(question, subproblems, solutions, self.style)])[0]

    def solve_directly(self, question: str) -> Generation:
        """Answer a whole question, steps written out."""
        return self.generate([prompts.direct_messages(question, self.style)])[0]
