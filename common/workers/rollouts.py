"""Rollouts (sampled completions) for GRPO from vLLM servers, and the check that they come from the current policy.

`ServedPlanner` replaces TRL's own vLLM client. TRL calls its `sync_weights()` before the first rollouts of a step, and
then `generate()`. Prompts and completions are sent as token ids, with the log-probability of each sampled token. The
trainer compares these with its own on every step (`PolicyCheck`). A server that answers with the base model, or with
an older version of the adapter, returns other log-probabilities and so is detected.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.processes.ranks import is_first
from common.servers.adapters import AdapterServers, check_takes_adapters, status_of
from common.servers.client import TRAINING_CONCURRENCY, TRAINING_RETRIES, Endpoint, Server, ServerError
from common.servers.probe import EXIT_CODE
from common.settings.grpo import TrainingArgs

logger = logging.getLogger(__name__)

# Limits in nats, measured in docs/training.md. If server and trainer compute in fp32: the largest difference of one
# token. If one of them does not: the mean over all tokens of a step.
FP32_LIMIT = 1e-3
HALF_LIMIT = 0.1
ADMIN_SECONDS = 60.0  # smallest time limit for loading an adapter, because a busy server needs long


class RunStoppedError(UserError):
    """Training cannot continue in any process. The trainer then saves a checkpoint of the steps done so far."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled.

    Attributes:
        temperature: of sampling.
        max_tokens: limit of a completion, in tokens.
        end_ids: ids of the tokens that end a completion.
        seed: of the run.
    """

    temperature: float
    max_tokens: int
    end_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion: T token ids, their T log-probabilities (None if unknown), and an error if there is none."""

    ids: list[int]
    logprobs: list[float | None]
    error: str | None = None


class ServedPlanner:
    """The planner in training, on vLLM servers.

    Each process asks for its own prompts. All completions of a group come from one server, also if the group's prompts
    belong to several processes.

    Args:
        adapters: publishes the versions of the adapter.
        servers: the same servers, with the retries and time limits of requests for completions.
        save: writes the adapter in training into a folder.
        sampling: of the completions.
        step: returns the number of optimiser steps done.
    """

    def __init__(
        self,
        adapters: AdapterServers,
        servers: Sequence[Server],
        save: Callable[[Path], None],
        sampling: Sampling,
        step: Callable[[], int],
    ) -> None:
        self.errors: list[str | None] = []  # one for each of the latest rollouts; None for a success
        self._adapters = adapters
        self._servers = list(servers)
        self._save = save
        self._sampling = sampling
        self._step = step
        self._name = ""
        self._asked: tuple[int, int] = (-1, 0)  # step, and number of earlier calls of `generate` in it

    @classmethod
    def from_settings(
        cls, args: TrainingArgs, *, save: Callable[[Path], None], end_ids: Sequence[int], step: Callable[[], int]
    ) -> ServedPlanner:
        """The planner on the servers of `--vllm-url`. Adapters that an earlier run left there are unloaded.

        Args:
            args: settings of the run.
            save: as in the class.
            end_ids: ids of the tokens that end a completion.
            step: as in the class.

        Raises:
            UserError: if a server does not answer.
        """
        # For `--vllm-patience` seconds these clients ask whether a server is back. Their time limit ends a request to a
        # server that hangs.
        admin = vllm_servers(args, retries=0, timeout=max(args.vllm_patience, ADMIN_SECONDS))
        servers = vllm_servers(args, retries=TRAINING_RETRIES, runner=admin[0].runner)
        folder = Path(args.vllm_adapter_dir or Path(args.output_dir) / "vllm_adapters")
        adapters = AdapterServers(admin, folder, patience=args.vllm_patience)
        if is_first():
            adapters.clear()
        return cls(
            adapters,
            servers,
            save,
            Sampling(args.temperature, args.max_completion_length, tuple(end_ids), args.seed),
            step,
        )

    def close(self) -> None:
        """Unload the current version, and delete the adapter folders written for the servers."""
        self._adapters.close()

    def sync_weights(self) -> None:
        """Publish the present weights of the adapter. Every process must call it.

        Raises:
            RunStoppedError: in all processes, if a server does not load the adapter.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None, None, 1]
        if PartialState().is_main_process:
            try:
                told[0] = self._adapters.publish(self._save)
            except UserError as error:
                told[1], told[2] = str(error), error.exit_code
        broadcast_object_list(told)
        if told[1] is not None:
            raise RunStoppedError(told[1], exit_code=told[2])
        self._name = self._adapters.current = told[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        images: Any = None,
        num_generations: int = 1,
        profiler: Any = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float | None]]], None]:
        """Completions of this process's B prompts, after the retries. Every process must call it.

        Args:
            prompts: B lists of token ids; the equal prompts of a group stand next to each other.
            images: must be None; TRL passes it.
            num_generations: size of a group (G).
            profiler: context manager around the servers' work.

        Returns:
            The prompts, the completions (B lists of T token ids), their log-probabilities (B × T × 1), and None. A
            prompt without a completion gets one end-of-sequence token with unknown log-probability, and its reason is
            in `errors`.

        Raises:
            RunStoppedError: in all processes, if one of them got no completion at all.
            UserError: for prompts with images.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        if images is not None:
            raise UserError("--vllm-url: prompts with images are not supported")
        step, calls = self._step(), self._asked[1] + 1 if self._asked[0] == self._step() else 0
        self._asked = (step, calls)
        first = PartialState().process_index * len(prompts)

        async def wave() -> list[Rollout]:
            waits: dict[int, asyncio.Task[None]] = {}
            return await asyncio.gather(
                *(
                    self._rollout(list(prompt), place, place // num_generations % len(self._servers), calls, waits)
                    for place, prompt in enumerate(prompts, start=first)
                )
            )

        with profiler or nullcontext():
            rollouts = self._servers[0].run(wave())
        self.errors = [rollout.error for rollout in rollouts]
        failed = [error for error in self.errors if error is not None]
        # Gathering also makes all processes wait. The worker uses the same servers next, and on vLLM's CPU backend its
        # answers are wrong while any process has planner requests in flight (docs/training.md).
        lost = gather_object([failed[0] if len(failed) == len(rollouts) else None])
        if any(lost):
            raise RunStoppedError(f"no completion from the servers: {next(filter(None, lost))}", exit_code=1)
        if failed:
            logger.warning("%d of %d samples masked, no completion: %s", len(failed), len(rollouts), failed[0])
        completions = [rollout.ids for rollout in rollouts]
        return (
            [list(prompt) for prompt in prompts],
            completions,
            [[[value] for value in rollout.logprobs] for rollout in rollouts],
            None,
        )

    async def _rollout(
        self, prompt: list[int], place: int, number: int, calls: int, waits: dict[int, asyncio.Task[None]]
    ) -> Rollout:
        """One completion. If its server fails, wait for the server and try once more.

        Args:
            prompt: token ids.
            place: index of the prompt among those of all processes.
            number: index of the server.
            calls: number of earlier calls of `generate` in this step.
            waits: tasks that wait for a failed server, one per server.
        """
        server = self._servers[number]
        try:
            try:
                return await self._ask(server, self._name, prompt, place, calls)
            except ServerError as error:
                if not (error.retryable or status_of(error) == 404):
                    raise
                if number not in waits:
                    logger.warning("%s; waiting for the server", error)
                    waits[number] = asyncio.ensure_future(self._adapters.restore(self._adapters.servers[number]))
            await waits[number]
            return await self._ask(server, self._name, prompt, place, calls)
        except UserError as error:
            return Rollout([self._sampling.end_ids[0]], [None], str(error))

    def sample_base(self, base: str, prompt: Sequence[int]) -> list[Rollout]:
        """One completion of a prompt by the base model of each server.

        Raises:
            ServerError: if a server gives none.
        """

        async def together() -> list[Rollout]:
            return await asyncio.gather(*(self._ask(server, base, prompt, 0, 0) for server in self._servers))

        return self._servers[0].run(together())

    async def _ask(self, server: Server, model: str, prompt: Sequence[int], place: int, calls: int) -> Rollout:
        sampling = self._sampling
        reply = await server.post(
            "/completions",
            {
                "model": model,
                "prompt": list(prompt),
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "stop_token_ids": list(sampling.end_ids),
                "seed": request_seed(sampling.seed, self._step(), calls, place),
                "logprobs": 0,  # log-probability of the sampled token only, without alternatives
                "return_token_ids": True,
                # Set explicitly, because a server's defaults come from the model, and training does not use those.
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
            },
        )
        ids, logprobs = read_completion(server, reply)
        return Rollout(ids, logprobs)


def vllm_servers(
    args: TrainingArgs, *, retries: int, runner: asyncio.Runner | None = None, timeout: float | None = None
) -> list[Server]:
    """Clients for the servers of `--vllm-url`; all share one runner. `timeout` (seconds) can lower `--vllm-timeout`."""
    servers: list[Server] = []
    seconds = min(args.vllm_timeout, timeout or args.vllm_timeout)
    for url in args.vllm_urls():
        endpoint = Endpoint(url, None, seconds, retries, TRAINING_CONCURRENCY, "--vllm-url", "--vllm-timeout")
        servers.append(Server(endpoint, runner or (servers[0].runner if servers else None)))
    return servers


async def check_rollout_server(server: Server, base: str, temperature: float) -> None:
    """Check before a model is loaded that a server can do what rollouts need.

    Args:
        server: the client.
        base: name of the base model there.
        temperature: of sampling in training.

    Raises:
        UserError: if it cannot; the message names the missing flag.
    """
    await check_takes_adapters(server)
    if temperature == 1:
        return  # at temperature 1, log-probabilities before and after the temperature are the same
    request = {"model": base, "prompt": "The sum of 2 and 3 is", "max_tokens": 1, "logprobs": 1, "seed": 0}
    request |= {"top_p": 1.0, "top_k": 0, "return_token_ids": True}
    told = []
    for heat in (1.0, 2.0):  # 2 is the highest temperature that vLLM accepts
        reply = await server.post("/completions", {**request, "temperature": heat})
        read_completion(server, reply)
        told.append(max(reply["choices"][0]["logprobs"]["top_logprobs"][0].values()))
    if abs(told[0] - told[1]) < 1e-3:
        raise UserError(
            f"--vllm-url {server.endpoint.url} tells log-probabilities before the temperature is applied: restart it "
            "with --logprobs-mode processed_logprobs"
        )


def read_completion(server: Server, reply: Any) -> tuple[list[int], list[float | None]]:
    """The T token ids of a completion, and their T log-probabilities.

    Raises:
        ServerError: if the reply does not contain them.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    ids = choice.get("token_ids")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if not ids or not logprobs or len(ids) != len(logprobs):
        raise ServerError(
            f"--vllm-url {server.endpoint.url} sent a completion without token ids or their log-probabilities: is it "
            "vLLM, and not older than the one in requirements-vllm.txt?"
        )
    return ids, logprobs


def request_seed(seed: int, step: int, calls: int, place: int) -> int:
    """A seed for one completion of a run. A repeated or resumed run gets the same seeds.

    Args:
        seed: of the run.
        step: optimiser steps done.
        calls: number of earlier calls of `generate` in this step.
        place: index of the prompt among those of all processes.
    """
    digest = hashlib.blake2b(f"{seed} {step} {calls} {place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2  # vLLM accepts seeds of up to 63 bits


@dataclass(frozen=True, slots=True)
class PolicyCheck:
    """The limit for the difference between a server's and the trainer's log-probabilities of the sampled tokens.

    The difference is the logarithm of the importance ratio, trainer's probability / server's probability. TRL also
    corrects the loss with that ratio (`vllm_importance_sampling_mode`; https://fengyao.notion.site/off-policy-rl).

    Args:
        limit: largest difference that rounding explains, in nats.
        of_mean: whether it applies to the mean over a step's tokens instead of to every token.
    """

    limit: float
    of_mean: bool

    @classmethod
    def of(cls, asked: float | None, *, full_precision: bool) -> PolicyCheck:
        """The limit that was asked for, or else that of the trainer's precision (fp32 or not)."""
        return cls(asked or (FP32_LIMIT if full_precision else HALF_LIMIT), not full_precision)

    def check(self, mean: float, largest: float, accused: str) -> None:
        """Stop a run whose server answers with another policy.

        Args:
            mean: mean difference over some tokens (nats).
            largest: largest difference of one token (nats).
            accused: beginning of the error message: what the server did wrong.

        Raises:
            RunStoppedError: with exit code 3.
        """
        if (mean if self.of_mean else largest) <= self.limit:  # false for nan
            return
        kind = "mean" if self.of_mean else "largest"
        raise RunStoppedError(
            f"{accused}: log-probabilities of server and trainer differ by {mean:.2g} in the mean and {largest:.2g} "
            f"at most (limit {self.limit:g} for the {kind}): the server answers with another adapter or base, or "
            "computes in another precision (its --dtype and --quantization; --vllm-max-gap)",
            exit_code=EXIT_CODE,
        )
