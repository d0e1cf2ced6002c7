"""A session with a server: connect, check which model answers, then ask questions."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from common.cli import say
from common.generation import Generation
from common.inference.trained_settings import find_training_config, read_training_settings, with_trained
from common.pipeline import OnAnswer, PipelineExecutor, PipelineItem, PipelineResult
from common.plans import Plan, plan_schema
from common.prompts import planner_messages
from common.runs.record import settings_from
from common.servers.client import Endpoint, Server
from common.servers.instructions import fold_if_dropped
from common.servers.model_list import ServedModel, adapter_of, base_model, check_parent, find_adapter
from common.servers.probe import probe
from common.settings.inference import PROMPT_SETTINGS, ServingArgs
from common.workers.remote import ServerModel, ServerWorker

VALID, REPAIRED, INVALID = "valid", "repaired", "invalid"


@dataclass(slots=True)
class Answer:
    """The answer to one question.

    Attributes:
        question: the word problem.
        result: the plan, the worker's answers and the final answer, or an error.
        plan_state: `valid` if the planner wrote only the JSON asked for, `repaired` if it also wrote other text,
            `invalid` if it wrote no plan.
        planner_seconds: time for the plan, in seconds.
        seconds: time for everything, in seconds.
    """

    question: str
    result: PipelineResult
    plan_state: str
    planner_seconds: float
    seconds: float

    def record(self) -> dict[str, Any]:
        """The answer as a JSON-ready object."""
        result, plan = self.result, self.result.plan
        return {
            "question": self.question,
            "answer": result.answer if result.error is None else None,
            "decision": "direct" if plan is None or not plan.should_decompose else "split",
            "plan_state": self.plan_state,
            "subproblems": [] if plan is None else list(plan.subproblems),
            "solutions": [solution.text for solution in result.solutions],
            "plan": None if plan is None else plan.plan,
            "final": None if result.final is None else result.final.text,
            "planner_output": result.item.planner_output,
            "planner_tokens": result.item.planner_tokens,
            "worker_tokens": result.worker_tokens,
            "seconds": round(self.seconds, 3),
            "error": result.error,
        }


class Session:
    """A planner and a worker on one or two servers. Use it in a `with` statement, which connects and checks them.

    Args:
        given: settings from the command line; the adapter's own training settings supply the others.

    Attributes:
        args: all settings; complete after connecting, like the attributes below.
        base: the base model on the server.
        adapter: name of the planner's adapter on the server.
        planner, worker: the models that answer.
        executor: carries out the plans.
        trained: settings of the adapter's training run; {} if they are not known.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self.args = ServingArgs(**given)
        self._runner = asyncio.Runner()
        self.server = Server(_endpoint(self.args, self.args.base_url, "--base-url"), self._runner)
        self._servers = [self.server]

    def __enter__(self) -> Session:
        """Read the list of models, take over the adapter's training settings, and check which model answers.

        Raises:
            UserError: if a server cannot be reached or used; with exit code 3 if a wrong model answers.
        """
        with ExitStack() as unfinished:
            unfinished.callback(self.__exit__)
            self._connect()
            unfinished.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            self.run(server.close())
        self._runner.close()

    def _connect(self) -> None:
        args, given = self.args, self._given
        served = self.server.contact()
        adapter = find_adapter(served, args.lora_adapter)
        self.base = base_model(served, args.model or _parent(served, adapter), flag="--model", adapter=adapter.name)
        check_parent(served, adapter, self.base)

        config = find_training_config(args.training_config, args.base_url, adapter.root)
        self.trained: dict[str, Any] = {} if config is None else read_training_settings(config)
        self.args = args = with_trained(given, self.trained)
        with settings_from(config, given):
            args.validate()
        say(f"planner {adapter.name}, base {self.base.name}, at {args.base_url}")
        chosen = "  ".join(f"{name}={getattr(args, name)}" for name in PROMPT_SETTINGS)
        say(f"{chosen}  ({'from flags and defaults' if config is None else f'from {config} and flags'})")

        self.adapter = adapter.name
        worker_server, worker_name = self.server, self.base.name
        worker_adapter: str | None = adapter.name
        if args.worker_url is not None or args.worker_model is not None:
            worker_server, worker_name, worker_adapter = self._other_worker(args, served)
            say(f"worker {worker_name}, at {worker_server.endpoint.url}")
        self.worker = ServerWorker(
            worker_server,
            worker_name,
            style=args.worker_style,
            context=args.worker_context,
            max_tokens=args.worker_max_tokens,
        )
        for server, name in {(self.server, self.base.name), (worker_server, worker_name)}:
            if self.run(fold_if_dropped(server, name)):
                say(f"the chat template of {name} drops system messages: the instructions go into the user's")
        if args.probe:
            self._check_who_answers(worker_adapter)
        self.planner = self.planner_model(self.adapter, args.temperature)
        self.executor = self.pipeline(None)

    def _other_worker(self, args: ServingArgs, served: list[ServedModel]) -> tuple[Server, str, str | None]:
        """The worker on another server or of another name: (server, model, an adapter that could answer instead)."""
        server = self.server
        if args.worker_url is not None:
            server = Server(_endpoint(args, args.worker_url, "--worker-url"), self._runner)
            self._servers.append(server)
            served = server.contact()
        at = server.endpoint.flag
        worker = base_model(served, args.worker_model, flag="--worker-model", at=at, adapter=args.lora_adapter)
        return server, worker.name, adapter_of(served, worker.name)

    def _check_who_answers(self, worker_adapter: str | None) -> None:
        style = self.args.planner_style
        found = self.run(probe(self.server, self.base.name, self.adapter, style))
        found.check(self.server.endpoint.url, need_adapter=True)
        say(f"probe: {found}")
        if self.worker.server is not self.server or self.worker.model != self.base.name:
            found = self.run(probe(self.worker.server, self.worker.model, worker_adapter, style))
            found.check(self.worker.server.endpoint.url, need_adapter=False)
            say(f"probe: {found}")

    def planner_model(self, name: str, temperature: float, seed: int | None = None) -> ServerModel:
        """A served model as planner.

        Args:
            name: of the model on the server.
            temperature: of sampling; 0 is greedy.
            seed: of sampling; None for a random one.
        """
        limits = (self.args.max_subproblems, self.args.max_subproblem_chars)
        schema = plan_schema(*limits) if self.args.structured else None
        return ServerModel(
            self.server, name, max_tokens=self.args.max_tokens, temperature=temperature, seed=seed, schema=schema
        )

    def pipeline(self, embeddings: Any) -> PipelineExecutor:
        """The pipeline with this session's worker. A question with an invalid plan is solved directly.

        Args:
            embeddings: a `common.similarity.Embeddings`, or None if independence is not needed.
        """
        return PipelineExecutor(
            self.worker,
            embeddings,
            max_subproblems=self.args.max_subproblems,
            max_subproblem_chars=self.args.max_subproblem_chars,
            plan_to_worker=self.args.plan_to_worker,
            invalid_plan="direct",
        )

    async def ask(
        self,
        question: str,
        on_plan: Callable[[PipelineItem, str, float], None] | None = None,
        on_answer: OnAnswer | None = None,
    ) -> Answer:
        """Plan, solve the subproblems, and combine. A failure is reported in the answer's `result.error`.

        Args:
            question: the word problem.
            on_plan: called with the planner's completion, its state, and the seconds it took.
            on_answer: called with each answer of the worker as it arrives.
        """
        started = time.perf_counter()
        written = await self.planner.answer(
            planner_messages(question, self.args.planner_style, self.args.worker_context)
        )
        took = time.perf_counter() - started
        item = PipelineItem(written.text, question, None, written.tokens, written.finished)
        if written.error is not None:
            return Answer(question, PipelineResult(item, None, error=written.error), INVALID, took, took)
        state = self.plan_state(written)
        if on_plan is not None:
            on_plan(item, state, took)
        result = await self.executor.answer(item, on_answer)
        return Answer(question, result, state, took, time.perf_counter() - started)

    def plan_of(self, item: PipelineItem) -> Plan | None:
        """The valid plan in a completion under this session's limits, or None."""
        return self.executor.parse_planner_output(item.planner_output, finished=item.finished)

    def plan_state(self, written: Generation) -> str:
        """`valid` if the planner wrote only a plan, `repaired` if also other text, `invalid` if no plan."""
        item = PipelineItem(written.text, "", None, written.tokens, written.finished)
        if self.plan_of(item) is None:
            return INVALID
        try:
            alone = isinstance(json.loads(written.text), dict)
        except ValueError:
            alone = False
        return VALID if alone else REPAIRED

    def run(self, work: Any) -> Any:
        """Run a coroutine to its end. Ctrl-C cancels it and raises KeyboardInterrupt."""
        return self._runner.run(work)


def _endpoint(args: ServingArgs, url: str, flag: str) -> Endpoint:
    return Endpoint(url, args.api_key, args.timeout, args.retries, args.concurrency, flag)


def _parent(served: list[ServedModel], adapter: ServedModel) -> str | None:
    """The adapter's parent, if the server serves a model of that name."""
    return adapter.parent if any(model.name == adapter.parent for model in served) else None


def plan_shares(records: Sequence[dict[str, Any]]) -> str:
    """Counts and shares of valid, repaired and invalid plans, as text."""
    counts = Counter(record["plan_state"] for record in records)
    return ", ".join(
        f"{counts[state]} {state} ({100 * counts[state] / len(records):.0f}%)" for state in (VALID, REPAIRED, INVALID)
    )
