"""Who answers? A check that a server's base model is the base model, also while its adapter is busy.

vLLM's CPU backend without a spare LoRA slot answers base requests that share a batch with adapter requests with
the adapter, silently (docs/inference.md). A worker that is the planner in disguise makes every number wrong, so nothing
is asked of a server before it has passed.

The same prompts go to the base alone (one at a time, and together), to the adapter alone, and to the base while
the adapter is answering. Answers are compared by the probabilities of their first tokens: texts would tell less,
since batching alone can turn a near tie. The distances between the two runs of the base alone are the noise that
the others are judged by.
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
ALTERNATIVES = 5  # per token, the most that every server grants
ROUNDS = 3  # of base requests beside adapter requests: one round can miss each other
# A distance is told from the noise of batching when it is this many times as large. The floor is for servers
# whose noise happens to measure 0: fp32 kernels agree to about 1e-5.
NOISE_FACTOR = 4.0
NOISE_FLOOR = 1e-3
_AMOUNTS = ((3, 5, 2), (7, 1, 6), (4, 4, 8), (9, 2, 1))


@dataclass(frozen=True, slots=True)
class Probe:
    """Distances (total variation, 0 same to 1 nothing in common), the largest of all prompts.

    noise: the base alone against itself, one prompt at a time and all together.
    separation: the adapter alone against the base alone; `adapter` is None, and it nan, where none is served.
    drift: the base beside the adapter against the base alone.
    """

    base: str
    adapter: str | None
    noise: float
    separation: float
    drift: float

    @property
    def threshold(self) -> float:
        """Distances up to here are noise."""
        return max(NOISE_FACTOR * self.noise, NOISE_FLOOR)

    @property
    def adapter_equals_base(self) -> bool:
        """Whether the adapter cannot be told from the base: untrained, not loaded, or the base is not itself."""
        return self.separation <= self.threshold

    @property
    def contaminated(self) -> bool:
        """Whether the base answers otherwise beside the adapter."""
        return self.drift > self.threshold

    def __str__(self) -> str:
        if self.adapter is None:
            return f"{self.base}: no adapter is served that could answer in its place"
        return (
            f"{self.base} answers as itself beside {self.adapter} (distance {self.drift:.2g}, noise {self.noise:.2g}; "
            f"the adapter's {self.separation:.2g})"
        )

    def check(self, url: str, *, need_adapter: bool) -> None:
        """Refuse a server that cannot be trusted.

        Args:
            url: of the server.
            need_adapter: whether an adapter that equals the base is refused too.

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
    """Measure who answers.

    Args:
        server: to be probed, by a few dozen short requests.
        base, adapter: names of the models there.
        style: of the planner's prompt, on which adapter and base differ most.

    Raises:
        ServerError: where a request fails.
    """
    if adapter is None:
        return Probe(base, None, 0.0, math.nan, 0.0)
    # A name no one has used: whatever the server remembers of earlier prompts (its prefix cache may hold what a
    # contaminated batch left there) is not of these.
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
    """How differently two answers to one prompt began: 0 the same, 1 nothing in common.

    The largest total variation (half the sum of |p − q|, over the listed tokens) up to and with the first place
    where the answers part: beyond it they read different texts. Without log-probabilities, whether the texts
    are equal.
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
    """|p − q| of a token; where one side does not list it, the least it can be.

    What is not listed is at most as likely as the least of what is, and as all that is left: two alternatives of
    nearly the same probability, of which noise lists now one and now the other, differ by next to nothing.
    """
    if token not in p:
        p, q = q, p
    if token in q:
        return abs(p[token] - q[token])
    return max(0.0, p[token] - min(min(q.values()), 1 - sum(q.values())))
