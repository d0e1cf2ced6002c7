"""The scoreboard of a run on a local model: rows before and after training, with the adapter on or off."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import models
from common.cli import counted, say
from common.evaluation.fingerprint import Fingerprint, RunFingerprints
from common.evaluation.scoreboard import (
    DIRECT,
    PARTS,
    RECORDS,
    SUPERVISED,
    TRAINED,
    UNTRAINED,
    VOTE,
    VOTE_TEMPERATURE,
    Row,
    parts_of,
    run_direct,
    run_planner,
    run_vote,
    save_scoreboard,
    stored_rows,
    votes_for,
    why_not_again,
)
from common.evaluation.table import scoreboard_table
from common.models.chat_date import fix_date
from common.pipeline import PipelineExecutor, run_executor
from common.problems.questions import Question
from common.processes import ranks
from common.processes.launcher import start_command
from common.processes.signals import stoppable
from common.runs import storage
from common.runs.checkpoints import complete_checkpoints
from common.runs.record import read_run_record, stored_date
from common.settings.grpo import TrainingArgs
from common.similarity import SentenceEncoder
from common.workers.frozen import FrozenBase
from common.workers.local import LocalModel
from common.workers.remote import ServerModel, ServerWorker

SCRIPT = "grpo_training.py"
# Questions of a row that each process answers between two savings of the row. Fewer fill the worker's batches less.
SAVED_QUESTIONS = 100


def evaluate_run(args: TrainingArgs, held_out: list[Question], *, anew: bool = False) -> int:
    """Make the scoreboard of a finished run. Returns the exit code 0.

    Args:
        args: settings of the run.
        held_out: questions that training did not use.
        anew: whether to make every row again instead of using stored ones.

    Raises:
        UserError: if a model cannot be loaded, or the disk is full.
    """
    import torch
    from peft import PeftModel

    tokenizer = models.load_tokenizer(args.base_model)
    record = read_run_record(Path(args.output_dir))
    day = stored_date(record)
    if day is not None:
        fix_date(tokenizer, day)
    # The dtype of the run, which may differ from the default on this machine.
    dtype = getattr(torch, record["dtype"].removeprefix("torch.")) if "dtype" in record else None
    base = models.load_base(
        args.base_model, four_bit=models.use_4bit(args), dtype=dtype, cpu_dtype=models.cpu_dtype(args)
    )
    frozen = FrozenBase(base, tokenizer)
    model = PeftModel.from_pretrained(base, args.adapter_path or args.output_dir)
    frozen.measure(model, step=0, adapter_path=args.adapter_path)
    encoder = SentenceEncoder(args.embedding_model)
    encoder.load()
    scoring = Scoring(args, model, tokenizer, run_executor(args, model, tokenizer, encoder), anew=anew)
    again = f"{start_command(SCRIPT)} --output-dir {shlex.quote(args.output_dir)} --eval-only"
    with (
        storage.explained(Path(args.output_dir), lambda: "make room, then start the same command again"),
        stoppable(lambda: f"the scoreboard was stopped; continue after its saved questions with {again}"),
    ):
        scoring.before(held_out)
        models.load_adapter_weights(model, args.output_dir)
        scoring.after(held_out)
    return 0


def how_to_continue(output_dir: Path) -> str:
    """What to tell a user who stopped the scoreboard of a run that trains."""
    command = storage.resume_command(SCRIPT, output_dir) if complete_checkpoints(output_dir) else "the same command"
    return f"the scoreboard was stopped; continue after its saved questions with {command}"


class Scoring:
    """Makes and stores the scoreboard of a run: some rows before training, the others after it.

    A stored row is used again if everything that determines it is the same and no question in it failed; what it lacks
    is added. With several processes, each answers its share of the questions, and the first one writes. All must call
    the same methods.

    Args:
        args: settings of the run.
        model: the planner, wrapped by PEFT.
        tokenizer: of the model.
        executor: carries out the plans.
        anew: whether to make every row again instead of using stored ones.
    """

    def __init__(
        self, args: TrainingArgs, model: Any, tokenizer: Any, executor: PipelineExecutor, *, anew: bool = False
    ) -> None:
        self._args = args
        self._model = model
        self._tokenizer = tokenizer
        # Same as for a user of the planner: a question with an invalid plan is solved directly.
        self._executor = executor.with_fallback()
        self._anew = anew
        self._earlier: dict[str, Row] = {}
        self._rows: dict[str, Row] = {}
        self._summary: dict[str, Any] = {}

    def before(self, held_out: list[Question]) -> None:
        """Make the rows of direct solving, of the base model as planner, and of the planner of a warm start."""
        args = self._args
        parts = parts_of(held_out)
        if ranks.is_first() and not self._anew:
            names = {DIRECT, VOTE, UNTRAINED, TRAINED, *([PARTS] if parts else ())}
            names |= set() if args.adapter_path is None else {SUPERVISED}
            stored = stored_rows(Path(args.output_dir))
            self._earlier = {name: row for name, row in stored.items() if name in names}
        say(f"scoreboard: {counted(len(held_out), 'question')}, before training")
        fingerprints = self._fingerprints(held_out)
        self._keep_or_make(
            DIRECT, fingerprints.direct, held_out, lambda part: run_direct(held_out[part], self._executor)
        )
        if parts:
            alone = self._fingerprints(parts)
            self._keep_or_make(PARTS, alone.direct, parts, lambda part: run_direct(parts[part], self._executor, PARTS))
        self._plan(UNTRAINED, lambda: fingerprints.planner(None), held_out, adapter=False)
        if args.adapter_path is not None:
            self._plan(SUPERVISED, lambda: fingerprints.planner(args.adapter_path), held_out, adapter=True)
        self._forget_times()

    def after(self, held_out: list[Question]) -> None:
        """Make the rows of the trained planner, and of direct solving with at least as many tokens."""
        args = self._args
        say(f"scoreboard: {counted(len(held_out), 'question')}, the trained planner")
        fingerprints = self._fingerprints(held_out)
        trained = self._plan(TRAINED, lambda: fingerprints.planner(args.output_dir), held_out, adapter=True)
        direct = self._rows[DIRECT]
        count = votes_for(trained.mean("total_tokens"), direct)

        def vote(part: slice) -> Row:
            voters = self._voters(first=part.start * (count - 1))
            return run_vote(held_out[part], direct.part(part), voters.generate, args.worker_style, count)

        self._keep_or_make(
            VOTE, lambda: fingerprints.vote(count, VOTE_TEMPERATURE), held_out, vote, seconds=direct.seconds
        )
        self._forget_times()
        if not ranks.is_first():
            return
        print("\n" + scoreboard_table(self._summary))
        print(f"scoreboard: {Path(args.output_dir) / 'evaluation.json'} and evaluation.png beside it")

    def _plan(
        self, name: str, fingerprint: Callable[[], Fingerprint], held_out: list[Question], *, adapter: bool
    ) -> Row:
        args = self._args
        planner = self._answerer(adapter=adapter, max_tokens=args.max_completion_length)
        return self._keep_or_make(
            name,
            fingerprint,
            held_out,
            lambda part: run_planner(name, held_out[part], self._executor, planner.generate, args.planner_style),
        )

    def _keep_or_make(
        self,
        name: str,
        fingerprint: Callable[[], Fingerprint],
        held_out: list[Question],
        make: Callable[[slice], Row],
        seconds: float = 0.0,
    ) -> Row:
        """A row: the stored one, or a new one, or a stored one with the questions that it lacks.

        The row is saved after every `SAVED_QUESTIONS` questions of a process, because a row can take an hour. Each
        process answers its share of them. Only the first process reads and writes the files of a run, so it decides
        for all processes.

        Args:
            name: of the row.
            fingerprint: gives everything that determines the content of the row.
            held_out: questions of the row.
            make: answers some of the questions.
            seconds: time that a new row has taken before its first question.
        """
        row = Row(name, [], seconds, fingerprint() if ranks.is_first() else {})
        if ranks.is_first():
            row = self._kept(row, held_out) or row
        row = ranks.from_first(row)
        missing = len(held_out) - len(row.records)
        parts = math.ceil(missing / (SAVED_QUESTIONS * ranks.world_size()))
        first = len(row.records)
        for part in range(parts):
            start, stop = (first + missing * end // parts for end in (part, part + 1))
            mine = ranks.share(stop - start)
            made = make(slice(start + mine.start, start + mine.stop))
            row.records += ranks.gathered(made.records)
            row.seconds += max(ranks.gathered([made.seconds]))
            if stop < len(held_out) and ranks.is_first():
                self._save(row)
        if missing:
            say(f"  {name}: {row.mean('correct'):.1%} in {row.seconds:.0f} s")
        self._rows[name] = row
        if ranks.is_first():
            self._summary = self._save()
        return row

    def _kept(self, new: Row, held_out: list[Question]) -> Row | None:
        """The stored row, whole or begun, if the new one would have the same content; else None."""
        earlier = self._earlier.pop(new.name, None)
        if earlier is None:
            return None
        reason = why_not_again(earlier, new.fingerprint, held_out)
        if reason is not None:
            say(f"  {new.name}: the earlier row is not used again, it was {reason}")
            return None
        found = "" if len(earlier.records) == len(held_out) else f"the first {len(earlier.records)} questions "
        say(f"  {new.name}: {found}as in {RECORDS} (--overwrite makes it again)")
        return earlier

    def _save(self, *unfinished: Row) -> dict[str, Any]:
        """Write the finished rows, and what a stopped scoreboard can use again. Returns the summary."""
        others = [*unfinished, *self._earlier.values()]
        return save_scoreboard(list(self._rows.values()), Path(self._args.output_dir), others)

    def _fingerprints(self, held_out: list[Question]) -> RunFingerprints:
        return RunFingerprints(self._args, self._model, self._tokenizer, self._executor.worker, held_out)

    def _forget_times(self) -> None:
        """Discard times and counters of the scoreboard, because they do not belong to a training step."""
        self._executor.worker.take_stats()
        if self._executor.embeddings is not None:
            self._executor.embeddings.take_seconds()

    def _voters(self, *, first: int) -> LocalModel | ServerModel:
        """The worker with sampling. `first` is the number of its first answer, counted over all processes."""
        args, worker = self._args, self._executor.worker
        if isinstance(worker, ServerWorker):
            return worker.sampler(VOTE_TEMPERATURE, args.seed + first)
        return self._answerer(
            adapter=False, max_tokens=args.worker_max_tokens, temperature=VOTE_TEMPERATURE, first=first
        )

    def _answerer(self, *, adapter: bool, max_tokens: int, temperature: float = 0.0, first: int = 0) -> LocalModel:
        return LocalModel(
            self._model,
            self._tokenizer,
            adapter=adapter,
            max_tokens=max_tokens,
            batch_tokens=self._args.worker_batch_tokens,
            temperature=temperature,
            seed=self._args.seed,
            first=first,
            cpu_dtype=models.cpu_dtype(self._args),
        )
