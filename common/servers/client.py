"""How an OpenAI-compatible server (vLLM above all) is asked: bounded concurrency, retries, errors of one line.

The key is sent and kept nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from common.errors import UserError
from common.generation import Generation
from common.prompts import Message, fold_system
from common.servers.model_list import ServedModel

T = TypeVar("T")

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_BACKOFF_SECONDS = 30.0
# Of a training run: its retries take about 20 s of pauses, so a server that is briefly away costs no samples.
TRAINING_RETRIES, TRAINING_CONCURRENCY = 5, 64


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is and how to talk to it. `timeout` is the seconds one attempt may take in all."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 2
    concurrency: int = 32
    flag: str = "--base-url"  # named in errors


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer to one prompt; where asked for, each token chosen and the log-probabilities around it.

    `chosen` has a token and `top` its likeliest alternatives (token → log-probability) per place, or both are
    empty: not every server tells.
    """

    generation: Generation
    chosen: tuple[str, ...] = ()
    top: tuple[dict[str, float], ...] = ()


class ServerError(UserError):
    """A request that came to nothing. `retryable` where another attempt may fare better."""

    def __init__(self, message: str, *, exit_code: int = 1, retryable: bool = False, wait: float = 0.0) -> None:
        super().__init__(message, exit_code=exit_code)
        self.retryable = retryable
        self.wait = wait  # seconds the server asks for


class Server:
    """One OpenAI-compatible server.

    Args:
        endpoint: address, key and patience.
        runner: of the event loop that all requests run on; give two servers the same one to use both at once.
    """

    def __init__(self, endpoint: Endpoint, runner: asyncio.Runner | None = None) -> None:
        from openai import AsyncOpenAI

        self.endpoint = endpoint
        self.runner = runner or asyncio.Runner()
        self._key = endpoint.api_key or os.environ.get(KEY_VARIABLE) or "none"
        # Retries and time limits are ours: the client's own cover neither a reply that is no JSON nor a trickle.
        self._client = AsyncOpenAI(base_url=endpoint.url, api_key=self._key, max_retries=0, timeout=endpoint.timeout)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self.takes_schema = True  # until it refuses one
        self._folds_system = False  # until the model's chat template refuses a system message

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run asynchronous work to its end; Ctrl-C cancels it."""
        return self.runner.run(work)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def models(self) -> list[ServedModel]:
        """What the server serves.

        Raises:
            ServerError: where nothing, or nothing of the kind, answers.
        """

        async def ask() -> list[ServedModel]:
            # Not `client.models.list()`: it stumbles over a reply that is no JSON, and drops what vLLM adds.
            page: Any = await self._client.get("/models", cast_to=object)
            entries = page.get("data") if isinstance(page, dict) else None
            if not isinstance(entries, list) or not all(isinstance(e, dict) and e.get("id") for e in entries):
                raise self._not_openai("list of models")
            return [ServedModel(str(e["id"]), e.get("parent"), e.get("root")) for e in entries]

        return await self._attempts(ask)

    async def chat(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        schema: dict[str, Any] | None = None,
        top_logprobs: int = 0,
    ) -> Reply:
        """Answer one prompt.

        A JSON schema is asked for only as long as the server takes one; a system message is put into the first
        user message for good once the model's chat template refuses it (training does the same).

        Raises:
            ServerError: with what is wrong, after the retries.
        """
        request: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        if seed is not None:
            request["seed"] = seed
        if top_logprobs:
            request |= {"logprobs": True, "top_logprobs": top_logprobs}

        async def ask() -> Reply:
            request["messages"] = fold_system(messages) if self._folds_system else list(messages)
            form = {"type": "json_schema", "json_schema": {"name": "plan", "schema": schema}}
            asked = request if schema is None or not self.takes_schema else {**request, "response_format": form}
            return self._read(await self._client.chat.completions.create(**asked))

        try:
            return await self._attempts(ask)
        except RefusedError as refused:
            told = refused.told.casefold()
            if not self._folds_system and messages[0]["role"] == "system" and "system" in told:
                self._folds_system = True
            elif schema is not None and self.takes_schema and _is_about_schema(told):
                self.takes_schema = False
            else:
                raise
            return await self._attempts(ask)

    async def _attempts(self, ask: Any) -> Any:
        """`ask` until it succeeds, fails for good or has failed too often; waits longer each time."""
        for attempt in range(self.endpoint.retries + 1):
            try:
                async with self._slots, asyncio.timeout(self.endpoint.timeout):
                    return await ask()
            except Exception as error:
                explained = self._explain(error)
                if not explained.retryable or attempt == self.endpoint.retries:
                    raise explained from error
            # Doubled each time, with jitter, so that many clients do not come back at once.
            pause = min(MAX_BACKOFF_SECONDS, 0.5 * 2**attempt) * (1 + random.random() / 4)
            await asyncio.sleep(max(pause, min(explained.wait, MAX_BACKOFF_SECONDS)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _read(self, completion: Any) -> Reply:
        choices = getattr(completion, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        if getattr(choice, "message", None) is None:
            raise self._not_openai("chat completion")
        assert choice is not None
        text = choice.message.content
        if not isinstance(text, str):
            raise ServerError(f"{self.endpoint.flag} {self.endpoint.url} sent a reply without text")
        tokens = getattr(getattr(completion, "usage", None), "completion_tokens", None) or 0
        listed = getattr(getattr(choice, "logprobs", None), "content", None) or []
        return Reply(
            Generation(text.strip(), tokens, choice.finish_reason == "stop"),
            tuple(place.token for place in listed),
            tuple({entry.token: entry.logprob for entry in place.top_logprobs} for place in listed),
        )

    def _not_openai(self, wanted: str) -> ServerError:
        return ServerError(
            f"{self.endpoint.flag} {self.endpoint.url}: what answers there is no OpenAI-compatible server (its reply "
            f"is no {wanted}): the address of vLLM's usually ends in :8000/v1",
            retryable=True,
        )

    def _explain(self, error: Exception) -> ServerError:
        """One line for whatever went wrong, with the way out."""
        import openai

        where = f"{self.endpoint.flag} {self.endpoint.url}"
        if isinstance(error, ServerError):
            return error
        if isinstance(error, (openai.APITimeoutError, TimeoutError)):
            return ServerError(
                f"{where}: no reply within {self.endpoint.timeout:g} s: is the server overloaded or hanging? "
                "Raise --timeout if it is only slow",
                retryable=True,
            )
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            reason = self._clean(str(cause) or type(cause).__name__) if cause is not None else "connection error"
            return ServerError(
                f"{where}: no answer ({reason}): is the server up, and the address right?", retryable=True
            )
        if isinstance(error, openai.APIStatusError):
            return self._explain_status(error, where)
        if isinstance(error, ValueError):  # a body that is no JSON, or of another shape
            return self._not_openai("JSON")
        if isinstance(error, openai.OpenAIError):
            return ServerError(f"{where}: {self._clean(str(error))}")
        raise error

    def _explain_status(self, error: Any, where: str) -> ServerError:
        told, status = self._clean(_told(error)), error.status_code
        if status in (401, 403):
            return ServerError(
                f"{where} refuses the key ({status}): give the right one in {KEY_VARIABLE} or --api-key", exit_code=2
            )
        if status in (408, 409, 429) or status >= 500:
            wait = error.response.headers.get("retry-after", "")
            return ServerError(
                f"{where} is in trouble ({status}: {told}): look at the server's log",
                retryable=True,
                wait=float(wait) if wait.isdigit() else 0.0,
            )
        if status == 404 and "model" not in told.casefold():
            return ServerError(f"{where} knows no such path (404): the address usually ends in /v1", exit_code=2)
        return RefusedError(f"{where} refuses the request ({status}): {told}", told)

    def _clean(self, text: str) -> str:
        """The first line of a text, short, without the key: servers like to repeat it."""
        lines = text.strip().splitlines() or [""]
        line = lines[0] if self._key == "none" else lines[0].replace(self._key, "…")
        return line if len(line) <= 240 else line[:239] + "…"


class RefusedError(ServerError):
    """A request that the server will never take: a model it lacks, a prompt that is too long. `told` is its reason."""

    def __init__(self, message: str, told: str) -> None:
        super().__init__(message, exit_code=2)
        self.told = told


def _is_about_schema(told: str) -> bool:
    return any(word in told for word in ("response_format", "json_schema", "schema", "grammar", "structured"))


def _told(error: Any) -> str:
    """What a server says about an error: OpenAI's body is {"error": {"message": …}}, others put it elsewhere."""
    body = error.body
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return body if isinstance(body, str) else str(error.message)
