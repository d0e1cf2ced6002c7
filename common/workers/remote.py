"""A model on an OpenAI-compatible server, used in place of a local one.

`ServerModel` corresponds to `LocalModel`, and `ServerWorker` to `FrozenWorker`. `common.servers.client` sends the
requests.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from common.cli import say
from common.errors import UserError
from common.generation import Generation, WorkerStats
from common.processes.ranks import is_first
from common.prompts import Message
from common.runs.files import check_writable
from common.servers.client import TRAINING_CONCURRENCY, TRAINING_RETRIES, Endpoint, Server, ServerError
from common.servers.instructions import fold_if_dropped
from common.servers.model_list import adapter_of, base_model
from common.servers.probe import probe
from common.settings.grpo import TrainingArgs
from common.workers.base import T, WorkerCalls
from common.workers.rollouts import check_rollout_server, vllm_servers


class ServerModel:
    """Answers prompts with one model of a server, all at the same time. Greedy answers are shared and cached.

    Args:
        server: the client.
        model: name of the model on the server.
        max_tokens: limit of an answer, in tokens.
        temperature: above 0, answers are sampled, and each request gets its own.
        seed: of the first sample; each later one adds 1. None leaves the seed to the server.
        schema: JSON schema of the answers, if the server supports one.
        cache_size: greedy answers kept; the least recently used is dropped first.
        others: servers with the same model, which share the requests.
    """

    def __init__(
        self,
        server: Server,
        model: str,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        schema: dict[str, Any] | None = None,
        cache_size: int = 0,
        others: Sequence[Server] = (),
    ) -> None:
        self.server = server
        self._others = others
        self._next = itertools.cycle([server, *others])
        self.model = model
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._seed = seed
        self._schema = schema
        self._cache_size = cache_size
        self._answers: OrderedDict[str, asyncio.Task[Generation]] = OrderedDict()
        self._stats = WorkerStats()

    def generate(self, requests: Sequence[Sequence[Message]]) -> list[Generation]:
        """Answer prompts, in their order; a failure affects only its own prompt."""

        async def together() -> list[Generation]:
            return await asyncio.gather(*(self.answer(request) for request in requests))

        return self.wait(together())

    async def answer(self, request: Sequence[Message]) -> Generation:
        """Answer one prompt; the `error` of the result says why there is no answer."""
        self._stats.requests += 1
        key = json.dumps(request) if self._temperature == 0 else None
        task = self._answers.get(key) if key is not None else None
        if task is None:
            task = asyncio.ensure_future(self._ask(request))
            if key is not None:
                self._answers[key] = task
        elif key is not None:
            self._answers.move_to_end(key)
        try:
            found = await task
        finally:
            # Forget a failed, cancelled or interrupted answer, so that its prompt is asked again.
            if key is not None and (not task.done() or task.cancelled() or task.result().error is not None):
                self._answers.pop(key, None)
        self._stats.failures += found.error is not None
        # Answers that are still awaited stay, even if there are more than the cache may keep.
        while len(self._answers) > self._cache_size and next(iter(self._answers.values())).done():
            self._answers.popitem(last=False)
        return found

    async def _ask(self, request: Sequence[Message]) -> Generation:
        seed = self._seed
        if seed is not None:
            self._seed = seed + 1
        try:
            reply = await next(self._next).chat(
                self.model,
                request,
                max_tokens=self._max_tokens,
                temperature=self._temperature,
                seed=seed,
                schema=self._schema,
            )
        except ServerError as error:
            return Generation("", 0, False, str(error))
        self._stats.generated += 1
        self._stats.generated_tokens += reply.generation.tokens or 0
        return reply.generation

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end and count its time."""
        started = time.perf_counter()
        try:
            return self.server.run(work)
        finally:
            self._stats.seconds += time.perf_counter() - started

    def take_stats(self) -> WorkerStats:
        """The counters since the last call; counting starts again at 0."""
        stats, self._stats = self._stats, WorkerStats()
        return stats


class ServerWorker(ServerModel, WorkerCalls):
    """The worker on a server: its base model, greedy, so a prompt always has the same answer.

    Args:
        style, context: of the prompts, see `common.prompts`.
        (the others): as in `ServerModel`.
    """

    def __init__(
        self,
        server: Server,
        model: str,
        *,
        style: str = "instruct",
        context: str = "question",
        max_tokens: int = 256,
        cache_size: int = 20000,
        others: Sequence[Server] = (),
    ) -> None:
        super().__init__(server, model, max_tokens=max_tokens, cache_size=cache_size, others=others)
        self.style, self.context = style, context

    @classmethod
    def from_settings(cls, args: TrainingArgs, tokenizer: Any = None) -> ServerWorker:
        """The worker that `--worker-url` or `--vllm-url` and related flags describe.

        Args:
            args: settings of the run.
            tokenizer: of the run's base model, to count tokens if the server does not.

        Raises:
            UserError: if a server cannot be reached, has no such base model, or two servers have different ones.
        """
        count = None if tokenizer is None else lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
        if args.worker_url is not None:
            servers = [Server(_worker_endpoint(args, args.worker_url, TRAINING_RETRIES), count_tokens=count)]
        else:
            servers = vllm_servers(args, retries=TRAINING_RETRIES)
        names = [
            base_model(s.run(s.models()), args.worker_model, flag="--worker-model", at=s.endpoint.flag).name
            for s in servers
        ]
        if len(set(names)) > 1:
            raise UserError(f"the servers of --vllm-url serve different base models: {', '.join(names)}")
        for server in servers:
            server.run(fold_if_dropped(server, names[0]))
        return cls(
            servers[0],
            names[0],
            style=args.worker_style,
            context=args.worker_context,
            max_tokens=args.worker_max_tokens,
            cache_size=args.worker_cache_size,
            others=servers[1:],
        )

    def sampler(self, temperature: float, seed: int) -> ServerModel:
        """The same model with sampling at `temperature`, from `seed` on, instead of greedy decoding."""
        return ServerModel(
            self.server,
            self.model,
            max_tokens=self._max_tokens,
            temperature=temperature,
            seed=seed,
            others=self._others,
        )


def _worker_endpoint(args: TrainingArgs, url: str, retries: int) -> Endpoint:
    return Endpoint(url, None, args.worker_timeout, retries, TRAINING_CONCURRENCY, "--worker-url", "--worker-timeout")


def check_worker(args: TrainingArgs) -> None:
    """Check that the server of `--worker-url` answers, and with its base model.

    The servers of `--vllm-url` are checked for loading adapters instead. There, planner and worker are never asked at
    the same time. So it does not matter whether the base model answers as itself while the adapter is busy.

    Raises:
        UserError: if a check fails; with exit code 3 if an adapter answers instead of the base model.
    """
    if not is_first():
        return  # once is enough; a process that stops ends the others
    if args.worker_url is None:
        if args.vllm_adapter_dir is not None:
            check_writable(Path(args.vllm_adapter_dir), "--vllm-adapter-dir")
        servers = vllm_servers(args, retries=0)
        for server in servers:
            server.contact()
        worker = ServerWorker.from_settings(args)
        for server in servers:
            server.run(check_rollout_server(server, worker.model, args.temperature))
        say(f"planner and worker ({worker.model}) on {', '.join(args.vllm_urls())}")
        return
    served = Server(_worker_endpoint(args, args.worker_url, 0)).contact()
    worker = ServerWorker.from_settings(args)
    found = worker.server.run(probe(worker.server, worker.model, adapter_of(served, worker.model)))
    found.check(args.worker_url, need_adapter=False)
    say(f"worker on {args.worker_url}: {found}")
