"""What a server's reply holds: OpenAI's form of it, and what other servers make of that form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from common.generation import Generation
from common.settings.secrets import redact

# Reasons to end that mean "cut off": the limit's by many names, and a filter that stepped in. All others ("stop",
# "eos", "eos_token", "stop_sequence", "end_turn", …) are the model's own end.
_CUT_OFF = {
    "length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "token_limit",
    "model_context_window_exceeded", "content_filter", "content_filtered", "safety", "recitation",
    "abort", "aborted", "cancelled", "error", "insufficient_system_resource",
}  # fmt: skip
# Where servers put what a model wrote before its answer, or all of it where they took the answer for reasoning.
_REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer to one prompt; where asked for, each token chosen and the log-probabilities around it.

    `chosen` has a token and `top` its likeliest alternatives (token → log-probability) per place, or both are
    empty: not every server tells. `written` is all that the model wrote, reasoning too. `prompt_tokens` is None where
    the server does not tell.
    """

    generation: Generation
    chosen: tuple[str, ...] = ()
    top: tuple[dict[str, float], ...] = ()
    written: str = ""
    prompt_tokens: int | None = None


def read_reply(body: Any, max_tokens: int) -> Reply | None:
    """The answer in the body of a chat completion; None where it holds none.

    An answer without content is read where the server put it for reasoning; one without either is empty. Its token
    count is None where the server tells none (null, or 0, as some do).

    Args:
        body: of the reply, as parsed JSON.
        max_tokens: longest answer asked for, which tells whether one without a reason to end was cut off.
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
    # Reasoning that was cut off had not come to its answer.
    text = content if content.strip() or not finished else reasoning
    generation = Generation(redact(text.strip()), tokens, finished)
    return Reply(generation, chosen, top, reasoning + content, _count(usage, "prompt_tokens", "input_tokens"))


def told_error(body: Any) -> tuple[int | None, str] | None:
    """(status, reason) of an error that a body holds, whatever the status it came with; None without one.

    OpenAI's is {"error": {"message": …, "code": …}}; others put it elsewhere, or into the first choice.
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
    """What the body of an error says, "" where it says nothing."""
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
    """The first of some counts that is told: 0 tokens are none, an answer has at least its end token."""
    values = [usage.get(name) for name in names] if isinstance(usage, dict) else []
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _text(value: Any, *, reasoning: bool) -> str:
    """A message's text: plain, or in parts; of content, parts with reasoning are left out."""
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
    return "" if kind else json.dumps(value)  # a part of another kind, or JSON that was parsed already


def _logprobs(value: Any) -> tuple[tuple[str, ...], tuple[dict[str, float], ...]]:
    try:
        places = value["content"] or []
        chosen = tuple(place["token"] for place in places)
        top = tuple({entry["token"]: entry["logprob"] for entry in place["top_logprobs"]} for place in places)
    except (TypeError, KeyError):
        return (), ()
    return chosen, top
