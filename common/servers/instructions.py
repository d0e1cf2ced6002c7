"""Check that system messages reach the model, for servers whose chat template drops them without an error."""

from __future__ import annotations

from common.servers.client import Server

_QUESTION = "Say in one word which of these comes first in the alphabet: pear, apple, plum, cherry."
_INSTRUCTIONS = ("Be brief.", "Be brief, be exact, be polite, and write numbers as digits: one line, and no list. " * 2)


async def fold_if_dropped(server: Server, model: str) -> bool:
    """Make the client put system messages into the user's message if the model would not see them.

    Two requests have the same question, but a short and a long system message. Their prompts have the same length only
    if the message is dropped. If a server reports no lengths, or impossible ones, nothing changes.

    Args:
        server: the client.
        model: name on the server.

    Returns:
        Whether system messages are dropped.

    Raises:
        ServerError: if a request fails.
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
