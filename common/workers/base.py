"""What the pipeline needs of a worker, and a worker's three calls for use as a library."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from common import prompts
from common.generation import Generation, WorkerStats
from common.prompts import Message

T = TypeVar("T")


class Worker(Protocol):
    """A worker, local or on a server: answers, counters, and the `style` and `context` of its prompts."""

    style: str
    context: str

    def generate(self, requests: Sequence[Sequence[Message]]) -> list[Generation]:
        """Answer prompts, in their order. A prompt that cannot be answered gives a `Generation` with an `error`."""

    def take_stats(self) -> WorkerStats:
        """The counters since the last call; counting starts again at 0."""


@runtime_checkable
class ConcurrentWorker(Worker, Protocol):
    """A worker that answers many prompts at the same time, each by itself (a server), so it needs no batches."""

    async def answer(self, request: Sequence[Message]) -> Generation:
        """Answer one prompt; the `error` of the result says why there is no answer."""

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of this worker to its end."""


class WorkerCalls:
    """A mix-in with three calls: for a subproblem, for combining, for a whole question. Each generates one answer."""

    style: str
    context: str
    generate: Callable[[Sequence[Sequence[Message]]], list[Generation]]

    def solve_subproblem(self, subproblem: str, question: str) -> Generation:
        """Answer one subproblem of a question. The worker's `context` decides whether the question is shown."""
        return self.generate([prompts.subproblem_messages(subproblem, question, self.style, self.context)])[0]

    def combine_solutions(self, question: str, subproblems: Sequence[str], solutions: Sequence[str]) -> Generation:
        """Answer a question with the solutions of its subproblems."""
        return self.generate([prompts.combine_messages(question, subproblems, solutions, self.style)])[0]

    def solve_directly(self, question: str) -> Generation:
        """Answer a whole question step by step."""
        return self.generate([prompts.direct_messages(question, self.style)])[0]
