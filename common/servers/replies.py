"""Read a server's reply, in OpenAI's format or one of the variants that other servers send."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from common.generation import Generation
from common.settings.secrets import redact

# Finish reasons for an answer that was cut off: the token limit under many names, and content filters. Any other reason
# ("stop", "eos", "eos_token", "stop_sequence", "end_turn", …) means that the model ended the answer itself.
_CUT_OFF = {
    "length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "token_limit",
    "model_context_window_exceeded", "content_filter", "content_filtered", "safety", "recitation",
    "abort", "aborted", "cancelled", "error", "insufficient_system_resource",
}  # fmt: skip
# Fields for the reasoning before the answer. Some servers put the whole answer there, if they take it for reasoning.
_REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
# Statuses that say nothing about the request's content: authorisation, address, rate limit, gateways.
NOT_OF_THE_REQUEST = (401, 403, 404, 408, 409, 429, 502, 503, 504)
_ROLES = re.compile(
    r"\broles?\b|system (message|prompt|instruction)|developer instruction|\balternat|chat.?template|jinja",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer to one prompt.

    Attributes:
        generation: the answer and its token count.
        chosen: the tokens of the answer, if log-probabilities were asked for and the server returns them; else empty.
        top: per token, the most likely alternatives (token → log-probability); else empty.
        written: everything that the model wrote, reasoning included.
        prompt_tokens: length of the prompt, or None if the server does not report it.
    """

    generation: Generation
    chosen: tuple[str, ...] = ()
    top: tuple[dict[str, float], ...] = ()
    written: str = ""
    prompt_tokens: int | None = None


def read_reply(body: Any, max_tokens: int) -> Reply | None:
    """The answer in the body of a chat completion, or None if there is none.

    If the content is empty, the answer is read from the reasoning, where some servers put it. If both are empty, the
    answer is "". The token count is None if the server reports none (null or 0).

    Args:
        body: of the reply, as parsed JSON.
        max_tokens: limit that was asked for. Without a finish reason, it decides whether the answer was cut off.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return None
    message = choice.get("message")
    if not isinstance(message, dict):
        if not isinstance(choice.get("text"), str):
            return None
        message = {"content": choice["text"]}
    chosen, top = _logprobs(choice.get("logprobs"))
    usage = body.get("usage")
    tokens = _completion_tokens(usage) or len(chosen) or None
    finished = _is_finished(choice.get("finish_reason"), tokens, max_tokens)
    content = _text(message.get("content"), reasoning=False)
    reasoning = next((found for name in _REASONING if (found := _text(message.get(name), reasoning=True))), "")
    # Reasoning that was cut off has not reached an answer, so it is not used as one.
    text = content if content.strip() or not finished else reasoning
    generation = Generation(redact(text.strip()), tokens, finished)
    return Reply(generation, chosen, top, reasoning + content, _count(usage, "prompt_tokens", "input_tokens"))


def told_error(body: Any) -> tuple[int | None, str] | None:
    """(status, reason) of an error that a body describes; None without an error. The HTTP status is not used.

    OpenAI's form is {"error": {"message": …, "code": …}}. Other servers put it elsewhere, or into the first choice.
    """
    if not isinstance(body, dict):
        return None
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    inner = first.get("error") if isinstance(first, dict) else None
    found = body.get("error") or inner
    if not found and not choices and (body.get("object") == "error" or "detail" in body):
        found = body
    if not found:
        return None
    code = found.get("code", found.get("status")) if isinstance(found, dict) else None
    status = int(code) if isinstance(code, (int, str)) and str(code).isdecimal() else 0
    return status if 400 <= status < 600 else None, reason_in(found)


def reason_in(body: Any) -> str:
    """The message in the body of an error, or ""."""
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    if body is None or body == "":
        return ""
    return body if isinstance(body, str) else json.dumps(body)


def _is_finished(reason: Any, tokens: int | None, max_tokens: int) -> bool:
    if isinstance(reason, str) and reason:
        return reason.rpartition(".")[2].casefold().replace("-", "_") not in _CUT_OFF
    return tokens is None or tokens < max_tokens


def _completion_tokens(usage: Any) -> int | None:
    found = _count(usage, "completion_tokens", "output_tokens")
    if found is None:
        total, prompt = _count(usage, "total_tokens"), _count(usage, "prompt_tokens", "input_tokens")
        found = total - prompt if total and prompt and total > prompt else None
    return found


def _count(usage: Any, *names: str) -> int | None:
    """The first of these counts that is reported. 0 counts as missing, because an answer has at least its end token."""
    values = [usage.get(name) for name in names] if isinstance(usage, dict) else []
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _text(value: Any, *, reasoning: bool) -> str:
    """A message's text: a string, or a list of parts. Parts with reasoning are left out of the content."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text(part, reasoning=reasoning) for part in value)
    if not isinstance(value, dict):
        return ""
    kind = str(value.get("type", ""))
    if kind.startswith(("thinking", "reasoning")):
        inner = value.get("thinking") or value.get("text") or value.get("summary")
        return _text(inner, reasoning=True) if reasoning else ""
    if "text" in value:
        return _text(value["text"], reasoning=reasoning)
    return "" if kind else json.dumps(value)  # without a type it is not a part, but an answer that the server parsed


def is_about_roles(reason: str) -> bool:
    """Whether an error's reason mentions message roles. Then the model's chat template accepts no system message."""
    return bool(_ROLES.search(reason))


def _logprobs(value: Any) -> tuple[tuple[str, ...], tuple[dict[str, float], ...]]:
    try:
        places = value["content"] or []
        chosen = tuple(place["token"] for place in places)
        top = tuple({entry["token"]: entry["logprob"] for entry in place["top_logprobs"]} for place in places)
    except (TypeError, KeyError):
        return (), ()
    return chosen, top
