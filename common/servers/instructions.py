"""Do the instructions arrive? A check for servers whose chat template drops system messages without a word."""

from __future__ import annotations

from common.servers.client import Server

_QUESTION = "Say in one word which of these comes first in the alphabet: pear, apple, plum, cherry."
_INSTRUCTIONS = ("Be brief.", "Be brief, be exact, be polite, and write numbers as digits: one line, and no list. " * 2)


async def fold_if_dropped(server: Server, model: str) -> bool:
    """Have system messages put into the user's where the model would not see them; whether that was needed.

    Told by the prompt's length: a short and a long system message before the same question make prompts of one
    length only where neither is in it. A server that tells no lengths, or none that can be right, is taken at its word.

    Raises:
        ServerError: where a request fails.
    """
    lengths = []
    for instructions in _INSTRUCTIONS:
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": _QUESTION}]
        lengths.append((await server.chat(model, messages, max_tokens=1)).prompt_tokens)
    short, long = lengths
    dropped = short is not None and short == long and short >= len(_QUESTION.split())
    if dropped:
        server.fold_system()
    return dropped
