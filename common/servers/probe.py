"""Check that a server's base model answers as itself, also while its adapter is busy.

vLLM's CPU backend has a fault. Without a spare LoRA slot, base requests in one batch with adapter requests are
answered by the adapter, without an error (docs/inference.md). If the planner answers instead of the worker, every
result is wrong. So a server is used only after it has passed this check.

The same prompts are sent several times: to the base model alone, one at a time and then together; to the adapter alone;
and to the base model while the adapter is busy. Answers are compared by the probabilities of their first tokens. Texts
would be less reliable, because batching alone can change a choice between nearly equal tokens. The noise is the
distance between the two runs of the base model alone. The other distances are compared with it.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError
from common.prompts import Message, planner_messages
from common.servers.client import Server
from common.servers.replies import Reply

EXIT_CODE = 3
TOKENS = 4  # compared per answer
ALTERNATIVES = 5  # per token: the largest number that every server returns
ROUNDS = 3  # of base requests together with adapter requests; in a single round they could miss each other's batch
# A distance counts as real if it is this many times the noise. The floor is for servers whose noise happens to be 0:
# fp32 kernels agree to about 1e-5.
NOISE_FACTOR = 4.0
NOISE_FLOOR = 1e-3
_AMOUNTS = ((3, 5, 2), (7, 1, 6), (4, 4, 8), (9, 2, 1))


@dataclass(frozen=True, slots=True)
class Probe:
    """Result of the check. Distances are total variations in [0, 1] (see `distance`), the largest over all prompts.

    Attributes:
        base: name of the base model.
        adapter: name of the adapter, or None if none is served.
        noise: base model alone, one prompt at a time, compared with all prompts together.
        separation: adapter alone, compared with base model alone; nan without an adapter.
        drift: base model while the adapter is busy, compared with base model alone.
    """

    base: str
    adapter: str | None
    noise: float
    separation: float
    drift: float

    @property
    def threshold(self) -> float:
        """Largest distance that counts as noise."""
        return max(NOISE_FACTOR * self.noise, NOISE_FLOOR)

    @property
    def adapter_equals_base(self) -> bool:
        """Whether adapter and base model answer alike. The adapter is untrained or not loaded, or answers for both."""
        return self.separation <= self.threshold

    @property
    def contaminated(self) -> bool:
        """Whether the base model answers differently while the adapter is busy."""
        return self.drift > self.threshold

    def __str__(self) -> str:
        if self.adapter is None:
            return f"{self.base}: no adapter is served that could answer in its place"
        return (
            f"{self.base} answers as itself beside {self.adapter} (distance {self.drift:.2g}, noise {self.noise:.2g}; "
            f"the adapter's {self.separation:.2g})"
        )

    def check(self, url: str, *, need_adapter: bool) -> None:
        """Refuse a server that answers requests with the wrong model.

        Args:
            url: of the server.
            need_adapter: whether to refuse also a server whose adapter answers like the base model.

        Raises:
            UserError: with exit code 3.
        """
        if self.adapter is None:
            return
        if self.contaminated:
            raise UserError(
                f"{url}: requests to {self.base} are answered by {self.adapter} when both are in flight (distance "
                f"{self.drift:.2g} from its own answers, noise {self.noise:.2g}): restart the server with a spare "
                "LoRA slot, --max-loras 2 (adapters + 1)",
                exit_code=EXIT_CODE,
            )
        if need_adapter and self.adapter_equals_base:
            raise UserError(
                f"{url}: {self.adapter} answers exactly like {self.base} (distance {self.separation:.2g}, noise "
                f"{self.noise:.2g}): it is untrained or not loaded, or {self.base} is answered by it: check "
                "--lora-modules and --max-loras of the server (--no-probe goes on all the same)",
                exit_code=EXIT_CODE,
            )


async def probe(server: Server, base: str, adapter: str | None, style: str = "full") -> Probe:
    """Measure which model answers, with a few dozen short requests.

    Args:
        server: the client.
        base: name of the base model.
        adapter: name of the adapter, or None.
        style: of the planner's prompt. With this prompt, adapter and base model differ most.

    Raises:
        ServerError: if a request fails.
    """
    if adapter is None:
        return Probe(base, None, 0.0, math.nan, 0.0)
    # A new name in each check, so that the server's prefix cache contains none of these prompts. The cache could
    # contain wrong keys and values from an earlier batch.
    name = secrets.token_hex(3)
    prompts = [
        planner_messages(
            f"Box {name}{first} holds {first} pens, {second} cups and {third} coins. How many things?", style
        )
        for first, second, third in _AMOUNTS
    ]

    async def ask(model: str, prompt: Sequence[Message], tokens: int = TOKENS) -> Reply:
        return await server.chat(model, prompt, max_tokens=tokens, top_logprobs=ALTERNATIVES)

    async def together(model: str) -> list[Reply]:
        return list(await asyncio.gather(*(ask(model, prompt) for prompt in prompts)))

    alone = [await ask(base, prompt) for prompt in prompts]
    noise = max(map(distance, alone, await together(base)))
    separation = max(map(distance, alone, await together(adapter)))

    done = asyncio.Event()

    async def keep_busy(prompt: Sequence[Message]) -> None:
        while not done.is_set():
            await ask(adapter, prompt, tokens=4 * TOKENS)

    busy = [asyncio.ensure_future(keep_busy(prompt)) for prompt in prompts]
    try:
        drift = max([max(map(distance, alone, await together(base))) for _ in range(ROUNDS)])
    finally:
        done.set()
        await asyncio.gather(*busy)
    return Probe(base, adapter, noise, separation, drift)


def distance(left: Reply, right: Reply) -> float:
    """How differently two answers to one prompt begin, in [0, 1]: 0 means equal, 1 nothing in common.

    Per token, the distance is the total variation, ½ Σ |p − q| over the listed tokens
    (https://en.wikipedia.org/wiki/Total_variation_distance_of_probability_measures). The largest one is returned, up to
    and including the first token at which the answers differ. After that token they continue different texts. Without
    log-probabilities the result is 0 for equal texts, otherwise 1.

    Args:
        left: one answer.
        right: another answer to the same prompt.
    """
    if not left.top or not right.top:
        return float(left.generation.text != right.generation.text)
    largest = 0.0
    for place, (mine, theirs) in enumerate(zip(left.top, right.top, strict=False)):
        p, q = ({token: math.exp(value) for token, value in side.items()} for side in (mine, theirs))
        gaps = [_gap(p, q, token) for token in p.keys() | q.keys()]
        largest = max(largest, sum(gaps) / 2)
        if left.chosen[place] != right.chosen[place]:
            break
    return largest


def _gap(p: dict[str, float], q: dict[str, float], token: str) -> float:
    """|p − q| of a token; if one side does not list it, a lower bound.

    An unlisted token is at most as probable as the least probable listed token, and as the remaining probability. With
    two nearly equal alternatives, noise decides which of them each side lists. Taking 0 for the unlisted one would then
    give a large distance, although the probabilities are almost equal.
    """
    if token not in p:
        p, q = q, p
    if token in q:
        return abs(p[token] - q[token])
    return max(0.0, p[token] - min(min(q.values()), 1 - sum(q.values())))
