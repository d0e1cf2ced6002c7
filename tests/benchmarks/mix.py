"""The plans of the benchmarks, and the plain ways of carrying them out with which ours is compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from common import prompts
from common.generation import Generation, WorkerStats
from common.pipeline import PipelineItem
from common.plans import parse_planner_output
from common.prompts import Message
from common.workers.local import end_token_ids

PLANS = Path(__file__).with_name("plans.jsonl")


def load_groups(path: Path = PLANS) -> list[list[PipelineItem]]:
    """The stored completions: one list per question."""
    groups = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        groups.append(
            [
                PipelineItem(found["text"], row["question"], row["answer"], found["tokens"], found["finished"])
                for found in row["completions"]
            ]
        )
    return groups


def grpo_mix(count: int, sizes: Sequence[int] = (8, 4)) -> list[PipelineItem]:
    """`count` completions in groups of these sizes in turn, with duplicates and invalid plans as they were sampled.

    After the last question the first comes again, with completions that were not used yet.

    Raises:
        ValueError: if there are fewer completions.
    """
    taken = [(group[:size], group[size:]) for group, size in zip(load_groups(), cycle(sizes), strict=False)]
    items = [item for part in zip(*taken, strict=True) for group in part for item in group]
    if len(items) < count:
        raise ValueError(f"{PLANS} has {len(items)} plans, not {count}")
    return items[:count]


def distinct_mix(count: int) -> list[PipelineItem]:
    """`count` completions with valid plans that have no worker prompt in common, so that no answer can be shared.

    Raises:
        ValueError: if there are fewer such completions.
    """
    items: list[PipelineItem] = []
    seen: set[tuple[str, str]] = set()
    for item in (group[turn] for turn in range(8) for group in load_groups()):
        plan = parse_planner_output(item.planner_output, finished=item.finished)
        if plan is None or len(items) == count:
            continue
        asked = [(item.question, part) for part in plan.subproblems] or [(item.question, "")]
        if len(set(asked)) == len(asked) and seen.isdisjoint(asked):
            seen.update(asked)
            items.append(item)
    if len(items) < count:
        raise ValueError(f"{PLANS} has only {len(items)} completions with nothing in common, not {count}")
    return items


class GenerateWorker:
    """A worker with transformers' `generate`, greedy.

    Args:
        model: a causal LM.
        tokenizer: of the model.
        style: of the worker's prompts.
        max_tokens: limit of an answer, in tokens.
        at_once: True for one left-padded batch of all distinct prompts of a wave. False for one call per prompt, with
            repeated prompts run again, as in a plain implementation.
    """

    def __init__(self, model: Any, tokenizer: Any, *, style: str, max_tokens: int, at_once: bool) -> None:
        self.style, self.context = style, "question"
        self._model, self._tokenizer, self._max_tokens, self._at_once = model, tokenizer, max_tokens, at_once
        self._stats = WorkerStats()

    def generate(self, requests: Sequence[Sequence[Message]]) -> list[Generation]:
        """Answer prompts, in their order."""
        texts = [prompts.render(self._tokenizer, request) for request in requests]
        batches = [list(dict.fromkeys(texts))] if self._at_once else [[text] for text in texts]
        found = [answers for batch in batches if batch for answers in self._generate(batch)]
        if not self._at_once:
            return found
        by_text = dict(zip(batches[0], found, strict=True))
        return [by_text[text] for text in texts]

    def take_stats(self) -> WorkerStats:
        """Counters since the last call."""
        stats, self._stats = self._stats, WorkerStats()
        return stats

    def _generate(self, texts: list[str]) -> list[Generation]:
        batch = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        batch = batch.to(self._model.device)
        ids = self._model.generate(**batch, max_new_tokens=self._max_tokens, do_sample=False)
        width = batch.input_ids.shape[1]
        ends = end_token_ids(self._model, self._tokenizer)
        answers = []
        for row in ids[:, width:].tolist():
            length = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            text = self._tokenizer.decode(row[:length], skip_special_tokens=True).strip()
            answers.append(Generation(text, length, row[length - 1] in ends))
        self._stats.generated += len(texts)
        self._stats.generated_tokens += sum(answer.tokens or 0 for answer in answers)
        return answers


def plain_pipeline(
    items: Sequence[PipelineItem], answer: Callable[[list[Message]], Generation], style: str
) -> list[list[Generation]]:
    """A plain implementation: one plan after the other, one call after the other, nothing shared.

    Args:
        items: the completions.
        answer: answers one prompt.
        style: of the worker's prompts.

    Returns:
        For each item the worker's answers: solutions and combination, or the direct answer, or none.
    """
    found: list[list[Generation]] = []
    for item in items:
        plan = parse_planner_output(item.planner_output, finished=item.finished)
        if plan is None:
            found.append([])
        elif not plan.should_decompose:
            found.append([answer(prompts.direct_messages(item.question, style))])
        else:
            parts = [answer(prompts.subproblem_messages(part, item.question, style)) for part in plan.subproblems]
            texts = [part.text for part in parts]
            found.append([*parts, answer(prompts.combine_messages(item.question, plan.subproblems, texts, style))])
    return found


class VllmWorker:
    """A worker that uses a vLLM server's completions endpoint, with all prompts of a wave in flight at once.

    The server must run with VLLM_SERVER_DEV_MODE=1, which `forget` needs.
    """

    def __init__(self, url: str, tokenizer: Any, *, style: str, max_tokens: int) -> None:
        self.style, self.context = style, "question"
        self._url, self._tokenizer, self._max_tokens = url.rstrip("/"), tokenizer, max_tokens
        with urlopen(f"{self._url}/v1/models") as response:
            self._model = json.load(response)["data"][0]["id"]
        self._stats = WorkerStats()

    def generate(self, requests: Sequence[Sequence[Message]]) -> list[Generation]:
        """Answer prompts, in their order; a repeated prompt is sent once."""
        texts = [prompts.render(self._tokenizer, request) for request in requests]
        distinct = list(dict.fromkeys(texts))
        with ThreadPoolExecutor(max_workers=max(1, len(distinct))) as pool:
            found = dict(zip(distinct, pool.map(self._complete, distinct), strict=True))
        self._stats.generated_tokens += sum(answer.tokens or 0 for answer in found.values())
        return [found[text] for text in texts]

    def forget(self) -> None:
        """Clear the server's prefix cache, so that an earlier repeat does not speed up the next one.

        Raises:
            ValueError: if the server does not run with VLLM_SERVER_DEV_MODE=1.
        """
        try:
            urlopen(Request(f"{self._url}/reset_prefix_cache", b"")).close()
        except HTTPError as error:
            raise ValueError(f"{error}: start the vLLM server with VLLM_SERVER_DEV_MODE=1") from error

    def take_stats(self) -> WorkerStats:
        """Counters since the last call."""
        stats, self._stats = self._stats, WorkerStats()
        return stats

    def _complete(self, text: str) -> Generation:
        body = {"model": self._model, "prompt": text, "max_tokens": self._max_tokens, "temperature": 0}
        request = Request(
            f"{self._url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as response:
            found = json.load(response)
        choice = found["choices"][0]
        tokens = found["usage"]["completion_tokens"]
        return Generation(choice["text"].strip(), tokens, choice["finish_reason"] == "stop")
