"""Fingerprints of scoreboard rows: short digests of everything that determines a row.

A stored row is used again if all its digests are the same. They depend on contents, not on names and paths. So a model
that was trained further in its folder counts as another model, and a run that was moved counts as the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import models, prompts
from common.grading import GRADER_VERSION
from common.problems.composed import chained_text, sum_text
from common.problems.questions import Question, fingerprint
from common.prompts import Message
from common.runs.adapters import read_adapter_config
from common.runs.files import sha256
from common.settings.grpo import TrainingArgs
from common.workers.remote import ServerWorker

Fingerprint = dict[str, str | None]  # name of an influence → its digest; None if it cannot be known

_WEIGHTS = (".safetensors", ".bin", ".gguf")
_BLOCK = 1 << 16
_BLOCKS = 1024  # blocks read per weights file, 64 MB in total: all of a small file, every 5 MB of a 5 GB one


class RunFingerprints:
    """Fingerprints of a run's rows on a local model.

    Args:
        args: settings of the run.
        model: the planner, wrapped by PEFT; also the worker, unless that is on a server.
        tokenizer: of the model.
        worker: of the pipeline.
        questions: of the scoreboard.
    """

    def __init__(
        self, args: TrainingArgs, model: Any, tokenizer: Any, worker: Any, questions: Sequence[Question]
    ) -> None:
        self._args = args
        self._tokenizer = tokenizer
        base = model.get_base_model()
        weights = base_content(args.base_model, getattr(base.config, "_commit_hash", None))
        self._base = (
            None if weights is None else [weights, models.use_4bit(args), str(base.dtype), models.cpu_dtype(args)]
        )
        self._questions = questions
        asked = worker_prompts(args.worker_style, args.worker_context, args.plan_to_worker)
        self._worker: Any = self._base
        self._worker_prompts: list[Any] = [self._rendered(messages) for messages in asked]
        if isinstance(worker, ServerWorker):  # the server renders the prompts, so messages are used, not texts
            self._worker, self._worker_prompts = [worker.server.endpoint.url, worker.model], asked

    def direct(self) -> Fingerprint:
        """Fingerprint of the row of direct solving."""
        worker = digest(self._worker) if self._worker is not None else None
        return direct_parts(self._questions, worker, self._worker_prompts, self._args.worker_max_tokens)

    def planner(self, adapter: str | None) -> Fingerprint:
        """Fingerprint of a planner's row.

        Args:
            adapter: folder of its adapter, or None for the base model.
        """
        args = self._args
        return {
            **self.direct(),
            "base": None if self._base is None else digest(self._base),
            "adapter": digest(None if adapter is None else adapter_content(Path(adapter))),
            **planner_parts(
                self._rendered(prompts.planner_messages("{question}", args.planner_style, args.worker_context)),
                [args.max_completion_length, args.max_subproblems, args.max_subproblem_chars],
                args.embedding_model,
            ),
        }

    def vote(self, count: int, temperature: float) -> Fingerprint:
        """Fingerprint of a majority vote over `count` answers: the greedy one, and samples at `temperature`."""
        return {**self.direct(), **vote_parts(count, temperature, self._args.seed)}

    def _rendered(self, messages: list[Message]) -> str:
        return prompts.render_all(self._tokenizer, [messages])[0]


def direct_parts(
    questions: Sequence[Question], worker: str | None, asked: Sequence[Any], max_tokens: int
) -> Fingerprint:
    """Influences on the row of direct solving, which are influences on every other row too.

    Args:
        questions: with their answers.
        worker: digest of the worker, or None if unknown.
        asked: its prompts, in the form it receives.
        max_tokens: limit of its answers.
    """
    return {
        "questions": fingerprint(questions),
        "grader": digest(GRADER_VERSION),
        "worker": worker,
        "worker prompts": digest(asked),
        "worker's limit": digest(max_tokens),
    }


def planner_parts(asked: Any, limits: Sequence[int], embedding_model: str) -> Fingerprint:
    """Influences on a planner's row besides the planner.

    Args:
        asked: its prompt, in the form it receives.
        limits: of a plan: tokens, number of subproblems, characters of a subproblem.
        embedding_model: name of the sentence encoder.
    """
    return {
        "planner prompts": digest(asked),
        "planner's limits": digest(limits),
        "embedding model": digest(embedding_model),
    }


def vote_parts(count: int, temperature: float, seed: int) -> Fingerprint:
    """Influences on a majority vote besides the worker.

    Args:
        count: votes per question.
        temperature: of the sampled votes.
        seed: of the sampled votes.
    """
    # "a seed each" describes how seeds are drawn: every answer has its own. If that changes, change this text too.
    return {"votes": digest([count, temperature, seed, "a seed each"])}


def worker_prompts(style: str, context: str = "question", plan_to_worker: bool = False) -> list[list[Message]]:
    """One prompt of each kind that the worker receives, with placeholders such as `{question}`.

    Args:
        style, context: of the worker, see `common.prompts`.
        plan_to_worker: whether the worker is shown the plan's text.
    """
    advice = "{plan}" if plan_to_worker else ""
    asked = ["{question}"]
    if style == "worked":  # other examples for questions made of several problems
        asked += [sum_text(["{first}", "{second}"]), chained_text("{first}", "{second}")]
    return [
        request
        for question in asked
        for request in (
            prompts.direct_messages(question, style, advice),
            prompts.subproblem_messages("{subproblem}", question, style, context),
            prompts.combine_messages(question, ["{first}", "{second}"], ["{one}", "{two}"], style, advice),
        )
    ]


def digest(value: Any) -> str:
    """16 hexadecimal digits for a JSON-ready value (SHA-256)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def adapter_content(folder: Path) -> list[str]:
    """What identifies an adapter: the SHA-256 of its weights, and a digest of its config.

    PEFT stores the target modules in another order each time, which changes nothing.
    """
    config = read_adapter_config(str(folder))
    content = {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in config.items()}
    return [sha256(folder / "adapter_model.safetensors"), digest(content)]


def base_content(name: str, commit: str | None) -> str | None:
    """What identifies the content of a base model: its commit on the Hub, or else a digest of its files.

    Of a weights file, only its size and blocks at equal distances are used. Reading every byte would take as long as
    loading the model.

    Args:
        name: Hub id or folder.
        commit: on the Hub, or None.

    Returns:
        The commit or the digest; None if neither is known.
    """
    folder = Path(models.resolve_model(name)).expanduser()
    if not folder.is_dir():
        return commit
    content = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if path.suffix in _WEIGHTS:
            content.append([path.name, path.stat().st_size, _sampled(path)])
        elif path.suffix in (".json", ".jinja", ".model", ".txt"):
            content.append([path.name, sha256(path)])
    return digest(content)


def _sampled(path: Path) -> str:
    """Digest of blocks at equal distances in a file, including its first and its last block."""
    size = path.stat().st_size
    found = hashlib.sha256()
    with path.open("rb") as stream:
        for number in range(_BLOCKS):
            place = max(size - _BLOCK, 0) * number // (_BLOCKS - 1) if size > _BLOCK * _BLOCKS else number * _BLOCK
            stream.seek(place)
            found.update(stream.read(_BLOCK))
    return found.hexdigest()


def difference(earlier: Fingerprint, now: Fingerprint) -> list[str]:
    """Names of the influences in which `earlier` differs from `now`. An unknown one counts as different."""
    return [name for name, value in now.items() if value is None or earlier.get(name) != value]
