"""Client of an OpenAI-compatible server, above all vLLM: limited concurrency, retries, errors in one line.

The key is sent to the server and stored nowhere else. `common.servers.replies` reads the replies.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from common.errors import UserError
from common.prompts import Message, fold_system, sendable
from common.servers.model_list import ServedModel
from common.servers.replies import NOT_OF_THE_REQUEST, Reply, is_about_roles, read_reply, reason_in, told_error
from common.settings.secrets import HIDDEN, OPENAI_VARIABLE, api_key, redact, scrub

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 30.0
# For a training run: pauses of about 20 s in total, so a server that is away for a short time costs no samples.
TRAINING_RETRIES, TRAINING_CONCURRENCY = 5, 64


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address of a server and how to talk to it.

    Attributes:
        url: base address, such as http://localhost:8000/v1.
        api_key: key of the server, or None for that of the environment.
        timeout: limit of one attempt, in seconds. The last attempt begins at most this long after the first one began,
            so a server that hangs costs at most twice this time, for any number of `retries`.
        retries: attempts after the first one.
        concurrency: most requests at once.
        flag, timeout_flag: flags that set address and timeout, for error messages.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 2
    concurrency: int = 32
    flag: str = "--base-url"
    timeout_flag: str = "--timeout"


class ServerError(UserError):
    """A request that failed. Callers of `Server` get this error only after its last attempt.

    Args:
        message: one line for the user.
        exit_code: of the script.
        retryable: whether another attempt may succeed.
        wait: pause that the server asks for, in seconds.
        rejected: whether the server refused this request itself. It may accept the request without what goes beyond
            plain chat, such as a JSON schema.
        about_roles: whether the chat template of the model accepts no system message.
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
    """What a server's model accepts: system messages (if not, they go into the user's message), and a JSON schema."""

    system: bool = True
    schema: bool = True


class Server:
    """One OpenAI-compatible server.

    Args:
        endpoint: address, key and limits.
        runner: of the event loop for all requests; pass the same one to two servers to use both at once.
        count_tokens: counts the tokens of a text, for servers that report no counts. Without it, the count of such an
            answer is None.

    Raises:
        UserError: if the key cannot be a key.
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
        # This class does retries and time limits: those of AsyncOpenAI do not cover invalid JSON or slow replies.
        self._client = AsyncOpenAI(base_url=endpoint.url, api_key=self._key, max_retries=0, timeout=endpoint.timeout)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._waiting = 0  # requests that are in flight or wait for a slot
        self._heard = 0.0  # time of the last reply of any kind
        self._hangs = False  # no reply came within the time limit of a waiting request
        self._count_tokens = count_tokens
        self._told_of_counts = False
        self._form = Form()  # assumed until the server refuses a part of it

    @property
    def takes_schema(self) -> bool:
        """Whether the server has not refused a JSON schema so far."""
        return self._form.schema

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end. Ctrl-C cancels it."""
        return self.runner.run(work)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def contact(self) -> list[ServedModel]:
        """The models that the server serves. Call it before other work starts, to find a wrong address early.

        Raises:
            UserError: with exit code 2, if nothing answers, or if it is not an OpenAI-compatible server.
        """
        try:
            return self.run(self.models())
        except ServerError as error:
            raise UserError(str(error)) from error

    async def models(self) -> list[ServedModel]:
        """The models that the server serves.

        Raises:
            ServerError: if nothing answers, or the reply is not a list of models.
        """

        async def ask() -> list[ServedModel]:
            # Not `client.models.list()`, which fails on a reply without JSON and drops vLLM's extra fields.
            page = self._checked(await self._client.get("/models", cast_to=object))
            entries = page.get("data") if isinstance(page, dict) else None
            if not isinstance(entries, list) or not all(isinstance(e, dict) and e.get("id") for e in entries):
                raise self._not_openai("list of models")
            return [ServedModel(str(e["id"]), e.get("parent"), e.get("root")) for e in entries]

        return await self._attempts(ask)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request of vLLM's own interface; returns the reply's JSON, or its text if it is not JSON.

        Args:
            path: below the server's base address.
            body: JSON-ready values.

        Raises:
            ServerError: after the retries. If there was an HTTP status, it is the `status_code` of the error's cause.
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

        A server may refuse a JSON schema or a system message. If it then accepts the request without it, later
        requests leave it out too. The system message then goes into the first user message, as in training.

        Args:
            model: name on the server.
            messages: the prompt.
            max_tokens: limit of the completion, in tokens.
            temperature: of sampling; 0 is greedy.
            seed: of sampling; None for a random one.
            schema: JSON schema that the completion must match, or None.
            top_logprobs: number of alternatives per token whose log-probabilities are asked for; 0 for none.

        Raises:
            ServerError: after the retries.
        """
        request: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        if seed is not None:
            request["seed"] = seed
        if top_logprobs:
            request |= {"logprobs": True, "top_logprobs": top_logprobs}
        messages = [{**message, "content": sendable(message["content"])} for message in messages]
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
        """From now on, put system messages into the user's message, because the chat template drops them."""
        self._form = replace(self._form, system=False)

    def _keep(self, form: Form) -> None:
        """Use the form of a successful request for all later requests."""
        if self._form.schema and not form.schema:
            logger.warning("%s takes no JSON schema: plans are asked for without one", self.endpoint.url)
        # Two requests at the same time may each have found one limit, so keep both.
        self._form = Form(self._form.system and form.system, self._form.schema and form.schema)

    async def _complete(self, request: dict[str, Any]) -> Reply:
        body = self._checked(await self._client.post("/chat/completions", body=request, cast_to=object))
        reply = read_reply(body, request["max_tokens"])
        if reply is None:
            raise self._not_openai("chat completion", rejected=True)
        return reply if reply.generation.tokens is not None else self._counted(reply)

    def _counted(self, reply: Reply) -> Reply:
        """The reply with a token count: the server's, or one counted here if that is possible."""
        if not self._told_of_counts:
            self._told_of_counts = True
            known = self._count_tokens is not None
            outcome = "its answers are counted with the planner's tokenizer" if known else "they are unknown"
            logger.warning("%s reports no token counts: %s", self.endpoint.url, outcome)
        if self._count_tokens is None:
            return reply
        tokens = self._count_tokens(reply.written) + reply.generation.finished  # plus the end-of-sequence token
        return replace(reply, generation=replace(reply.generation, tokens=tokens))

    async def _attempts(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Repeat `ask` until it succeeds, fails permanently, or has no attempts or time left. Each pause is longer."""
        self._waiting += 1
        began, most = time.monotonic(), self.endpoint.timeout
        try:
            for attempt in range(self.endpoint.retries + 1):
                try:
                    async with self._slots:
                        began = time.monotonic() if attempt == 0 else began
                        return await self._attempt(ask)
                except Exception as error:
                    explained = self._explain(error)
                    # Doubled each time (exponential backoff), with jitter, so that clients do not all return at once.
                    pause = min(MAX_BACKOFF_SECONDS, 0.5 * 2**attempt) * (1 + random.random() / 4)
                    pause = max(pause, min(explained.wait, MAX_BACKOFF_SECONDS))
                    too_late = time.monotonic() + pause - began >= most
                    if not explained.retryable or attempt == self.endpoint.retries or too_late:
                        scrub(error)
                        raise explained from error
                await asyncio.sleep(pause)
        finally:
            self._waiting -= 1
            self._hangs = self._hangs and self._waiting > 0
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _attempt(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `ask` within the time limit. While the server hangs, raise TimeoutError immediately.

        Otherwise each group of `concurrency` waiting requests would need the full time limit.
        """
        import openai

        if self._hangs:
            raise TimeoutError
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                found = await ask()
        except (TimeoutError, openai.APITimeoutError) as error:
            self._hangs = self._heard < began
            raise TimeoutError from error
        except Exception:
            self._heard, self._hangs = time.monotonic(), False
            raise
        self._heard, self._hangs = time.monotonic(), False
        return found

    def _checked(self, body: Any) -> Any:
        """The body of a reply with status 200, unless it describes an error."""
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
            about_roles=is_about_roles(reason),
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
        """Convert any error to a `ServerError` with one line that says what to do."""
        import openai

        if isinstance(error, ServerError):
            return error
        if isinstance(error, TimeoutError):
            return ServerError(
                f"{self._where}: no reply within {self.endpoint.timeout:g} s: is the server overloaded or hanging? "
                f"Raise {self.endpoint.timeout_flag} if it is only slow",
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
        if isinstance(error, (ValueError, RecursionError)):  # a body that is no JSON, or of another shape
            return self._not_openai("JSON")
        if isinstance(error, openai.OpenAIError):
            return ServerError(f"{self._where}: {self._clean(str(error))}")
        raise error

    def _explain_status(self, status: int, reason: str, wait: str) -> ServerError:
        """Convert an error status of the server. `wait` is the text of its Retry-After header."""
        told = self._clean(reason) or "it gives no reason"
        about_roles = status not in NOT_OF_THE_REQUEST and is_about_roles(reason)
        if status in (401, 403):
            return ServerError(
                f"{self._where} refuses the key ({status}): give the right one in {OPENAI_VARIABLE}",
                exit_code=2,
            )
        if status in (408, 409, 429) or status >= 500:
            return ServerError(
                f"{self._where} failed ({status}: {told}): look at the server's log",
                retryable=not about_roles,  # some servers report a template's refusal as 500; it would repeat
                wait=float(wait) if wait.isascii() and wait.isdigit() else 0.0,
                rejected=status not in NOT_OF_THE_REQUEST,
                about_roles=about_roles,
            )
        if status == 404 and "model" not in told.casefold():
            return ServerError(f"{self._where} knows no such path (404): the address usually ends in /v1", exit_code=2)
        return ServerError(
            f"{self._where} refuses the request ({status}): {told}",
            exit_code=2,
            rejected=status not in NOT_OF_THE_REQUEST,
            about_roles=about_roles or (status not in NOT_OF_THE_REQUEST and "system" in reason.casefold()),
        )

    def _clean(self, text: str) -> str:
        """First line of a server's text, shortened, and without the key, which servers often repeat."""
        lines = redact(text).strip().splitlines() or [""]
        # Short keys are not hidden everywhere (see `common.settings.secrets`), but they are hidden here.
        line = lines[0] if self._key == "none" else lines[0].replace(self._key, HIDDEN)
        return line if len(line) <= 240 else line[:239] + "…"
