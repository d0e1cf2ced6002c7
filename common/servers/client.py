"""How an OpenAI-compatible server (vLLM above all) is asked: bounded concurrency, retries, errors of one line.

The key is sent and kept nowhere else. What servers send back, and how, is in `common.servers.replies`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from common.errors import UserError
from common.prompts import Message, fold_system
from common.servers.model_list import ServedModel
from common.servers.replies import Reply, read_reply, reason_in, told_error
from common.settings.secrets import HIDDEN, OPENAI_VARIABLE, api_key, redact, scrub

T = TypeVar("T")
logger = logging.getLogger(__name__)

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


class ServerError(UserError):
    """A request that came to nothing.

    Args:
        retryable: whether another attempt may fare better.
        wait: seconds the server asks for.
        rejected: whether the server answered, with an error of this request's own: without what it asks for beyond
            plain chat it may be taken.
        about_roles: whether the error is about who says what: the model's chat template takes no system message.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int = 1,
        retryable: bool = False,
        wait: float = 0.0,
        rejected: bool = False,
        about_roles: bool = False,
    ) -> None:
        super().__init__(message, exit_code=exit_code)
        self.retryable = retryable
        self.wait = wait
        self.rejected = rejected
        self.about_roles = about_roles


@dataclass(frozen=True, slots=True)
class Form:
    """What a server's model takes: system messages (else they go into the user's message), a JSON schema."""

    system: bool = True
    schema: bool = True


class Server:
    """One OpenAI-compatible server.

    Args:
        endpoint: address, key and patience.
        runner: of the event loop that all requests run on; give two servers the same one to use both at once.
        count_tokens: of a text, for servers that tell no counts; without it such an answer's count is None.

    Raises:
        UserError: for a key that cannot be one.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        runner: asyncio.Runner | None = None,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        from openai import AsyncOpenAI

        self.endpoint = endpoint
        self.runner = runner or asyncio.Runner()
        self._key = api_key(endpoint.api_key) or "none"
        # Retries and time limits are ours: the client's own cover neither a reply that is no JSON nor a trickle.
        self._client = AsyncOpenAI(base_url=endpoint.url, api_key=self._key, max_retries=0, timeout=endpoint.timeout)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._count_tokens = count_tokens
        self._told_of_counts = False
        self._form = Form()  # until the server refuses a part of it

    @property
    def takes_schema(self) -> bool:
        """Whether the server has not refused a JSON schema so far."""
        return self._form.schema

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
            page = self._checked(await self._client.get("/models", cast_to=object))
            entries = page.get("data") if isinstance(page, dict) else None
            if not isinstance(entries, list) or not all(isinstance(e, dict) and e.get("id") for e in entries):
                raise self._not_openai("list of models")
            return [ServedModel(str(e["id"]), e.get("parent"), e.get("root")) for e in entries]

        return await self._attempts(ask)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers to a request of vLLM's own: parsed JSON, or text where the reply is none.

        Raises:
            ServerError: with what is wrong, after the retries; its cause has the `status_code`, where there was one.
        """

        async def ask() -> Any:
            return await self._client.post(path, cast_to=object, body=body)

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

        What the server turns out not to take is left out for good once a request without it has succeeded: a JSON
        schema, and a system message, which then goes into the first user message (training does the same).

        Raises:
            ServerError: with what is wrong, after the retries.
        """
        request: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        if seed is not None:
            request["seed"] = seed
        if top_logprobs:
            request |= {"logprobs": True, "top_logprobs": top_logprobs}
        messages = [{**message, "content": _sendable(message["content"])} for message in messages]
        has_system = bool(messages) and messages[0]["role"] == "system"
        form = self._form
        while True:
            shaped = {**request, "messages": messages if form.system else fold_system(messages)}
            if schema is not None and form.schema:
                shaped["response_format"] = {"type": "json_schema", "json_schema": {"name": "plan", "schema": schema}}
            try:
                reply = await self._attempts(partial(self._complete, shaped))
            except ServerError as error:
                if has_system and form.system and error.about_roles:
                    form = replace(form, system=False)
                elif schema is not None and form.schema and error.rejected:
                    form = replace(form, schema=False)
                else:
                    raise
            else:
                self._keep(form)
                return reply

    def fold_system(self) -> None:
        """Put system messages into the user's from now on: the model's chat template drops them."""
        self._form = replace(self._form, system=False)

    def _keep(self, form: Form) -> None:
        """Go on with what has worked."""
        if self._form.schema and not form.schema:
            logger.warning("%s takes no JSON schema: plans are asked for without one", self.endpoint.url)
        # Of two requests in flight each may have found out one thing.
        self._form = Form(self._form.system and form.system, self._form.schema and form.schema)

    async def _complete(self, request: dict[str, Any]) -> Reply:
        body = self._checked(await self._client.post("/chat/completions", body=request, cast_to=object))
        reply = read_reply(body, request["max_tokens"])
        if reply is None:
            raise self._not_openai("chat completion", rejected=True)
        return reply if reply.generation.tokens is not None else self._counted(reply)

    def _counted(self, reply: Reply) -> Reply:
        """The reply with its tokens counted here, where that can be."""
        if not self._told_of_counts:
            self._told_of_counts = True
            known = self._count_tokens is not None
            outcome = "its answers are counted with the planner's tokenizer" if known else "they are unknown"
            logger.warning("%s tells no token counts: %s", self.endpoint.url, outcome)
        if self._count_tokens is None:
            return reply
        tokens = self._count_tokens(reply.written) + reply.generation.finished  # the end token
        return replace(reply, generation=replace(reply.generation, tokens=tokens))

    async def _attempts(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """`ask` until it succeeds, fails for good or has failed too often; waits longer each time."""
        for attempt in range(self.endpoint.retries + 1):
            try:
                async with self._slots, asyncio.timeout(self.endpoint.timeout):
                    return await ask()
            except Exception as error:
                explained = self._explain(error)
                if not explained.retryable or attempt == self.endpoint.retries:
                    scrub(error)
                    raise explained from error
            # Doubled each time, with jitter, so that many clients do not come back at once.
            pause = min(MAX_BACKOFF_SECONDS, 0.5 * 2**attempt) * (1 + random.random() / 4)
            await asyncio.sleep(max(pause, min(explained.wait, MAX_BACKOFF_SECONDS)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _checked(self, body: Any) -> Any:
        """The body of a reply with status 200, unless it is an error all the same."""
        found = told_error(body)
        if found is None:
            return body
        status, reason = found
        if status is not None:
            raise self._explain_status(status, reason, "")
        raise ServerError(
            f"{self._where} answers with an error: {self._clean(reason) or 'it gives no reason'}",
            retryable=True,
            rejected=True,
            about_roles=bool(_ROLES.search(reason)),
        )

    def _not_openai(self, wanted: str, *, rejected: bool = False) -> ServerError:
        return ServerError(
            f"{self._where}: what answers there is no OpenAI-compatible server (its reply is no {wanted}): the address "
            "of vLLM's usually ends in :8000/v1",
            retryable=True,
            rejected=rejected,
        )

    @property
    def _where(self) -> str:
        return f"{self.endpoint.flag} {self.endpoint.url}"

    def _explain(self, error: Exception) -> ServerError:
        """One line for whatever went wrong, with the way out."""
        import openai

        if isinstance(error, ServerError):
            return error
        if isinstance(error, (openai.APITimeoutError, TimeoutError)):
            return ServerError(
                f"{self._where}: no reply within {self.endpoint.timeout:g} s: is the server overloaded or hanging? "
                "Raise --timeout if it is only slow",
                retryable=True,
            )
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            reason = self._clean(str(cause) or type(cause).__name__) if cause is not None else "connection error"
            return ServerError(
                f"{self._where}: no answer ({reason}): is the server up, and the address right?", retryable=True
            )
        if isinstance(error, openai.APIStatusError):
            reason = reason_in(error.body) if error.body is not None else ""
            return self._explain_status(error.status_code, reason, error.response.headers.get("retry-after", ""))
        if isinstance(error, ValueError):  # a body that is no JSON, or of another shape
            return self._not_openai("JSON")
        if isinstance(error, openai.OpenAIError):
            return ServerError(f"{self._where}: {self._clean(str(error))}")
        raise error

    def _explain_status(self, status: int, reason: str, wait: str) -> ServerError:
        """One line for an error that the server answered with; `wait` is its Retry-After."""
        told = self._clean(reason) or "it gives no reason"
        about_roles = status not in _NOT_OF_THE_REQUEST and bool(_ROLES.search(reason))
        if status in (401, 403):
            return ServerError(
                f"{self._where} refuses the key ({status}): give the right one in {OPENAI_VARIABLE} or --api-key",
                exit_code=2,
            )
        if status in (408, 409, 429) or status >= 500:
            return ServerError(
                f"{self._where} is in trouble ({status}: {told}): look at the server's log",
                retryable=not about_roles,  # a template's refusal comes as 500 from some servers, and stays
                wait=float(wait) if wait.isdigit() else 0.0,
                rejected=status not in _NOT_OF_THE_REQUEST,
                about_roles=about_roles,
            )
        if status == 404 and "model" not in told.casefold():
            return ServerError(f"{self._where} knows no such path (404): the address usually ends in /v1", exit_code=2)
        return ServerError(
            f"{self._where} refuses the request ({status}): {told}",
            exit_code=2,
            rejected=status not in _NOT_OF_THE_REQUEST,
            about_roles=about_roles or (status not in _NOT_OF_THE_REQUEST and "system" in reason.casefold()),
        )

    def _clean(self, text: str) -> str:
        """The first line of a text, short, without the key: servers like to repeat it."""
        lines = redact(text).strip().splitlines() or [""]
        # Also a key that is too short to be hidden everywhere.
        line = lines[0] if self._key == "none" else lines[0].replace(self._key, HIDDEN)
        return line if len(line) <= 240 else line[:239] + "…"


def _sendable(text: str) -> str:
    """A text as UTF-8 can hold it: bytes of a command line that Python could not decode, as the UTF-8 that they are."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # half a surrogate pair: models do write them, and their text goes into prompts
        return text.encode("utf-8", "replace").decode()


# Statuses that say nothing about what was asked: who asks, where, how often, and gateways before the server.
_NOT_OF_THE_REQUEST = (401, 403, 404, 408, 409, 429, 502, 503, 504)
_ROLES = re.compile(
    r"\broles?\b|system (message|prompt|instruction)|developer instruction|\balternat|chat.?template|jinja",
    re.IGNORECASE,
)
