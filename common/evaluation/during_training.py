"""The scoreboard of a run on a local model: who answers, with the adapter on or off, before and after training."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from common import models, prompts
from common.cli import say
from common.evaluation.scoreboard import (
    DIRECT,
    SUPERVISED,
    TRAINED,
    UNTRAINED,
    VOTE_TEMPERATURE,
    Row,
    load_rows,
    run_direct,
    run_planner,
    run_vote,
    save_scoreboard,
)
from common.evaluation.table import scoreboard_table
from common.pipeline import PipelineExecutor, run_executor
from common.problems.questions import Question
from common.runs.record import read_run_record
from common.settings.grpo import TrainingArgs
from common.similarity import SentenceEncoder
from common.workers.frozen import FrozenBase
from common.workers.local import LocalModel
from common.workers.remote import ServerWorker


def evaluate_run(args: TrainingArgs, held_out: list[Question]) -> int:
    """The scoreboard of a run that has ended; returns 0."""
    from peft import PeftModel

    tokenizer = models.load_tokenizer(args.base_model)
    shown = read_run_record(Path(args.output_dir)).get("prompt_date")
    if shown is not None:
        prompts.fix_date(tokenizer, date.fromisoformat(shown))
    base = models.load_base(args.base_model, four_bit=models.use_4bit(args))
    frozen = FrozenBase(base, tokenizer)
    model = PeftModel.from_pretrained(base, args.adapter_path or args.output_dir)
    frozen.measure(model, step=0, adapter_path=args.adapter_path)
    encoder = SentenceEncoder(args.embedding_model)
    encoder.load()
    scoring = Scoring(args, model, tokenizer, run_executor(args, model, tokenizer, encoder))
    scoring.before(held_out)
    models.load_adapter_weights(model, args.output_dir)
    scoring.after(held_out)
    return 0


class Scoring:
    """Keeps the scoreboard of a run: rows that need no training before it, the trained planner's after it."""

    def __init__(self, args: TrainingArgs, model: Any, tokenizer: Any, executor: PipelineExecutor) -> None:
        self._args = args
        self._model = model
        self._tokenizer = tokenizer
        # What a user of the planner gets: a plan that cannot be used is solved directly.
        self._executor = executor.with_fallback()
        self._rows: dict[str, Row] = {}
        self._summary: dict[str, Any] = {}

    def before(self, held_out: list[Question]) -> None:
        """Direct solving, the base model as planner, and the planner that training starts from, if any."""
        args = self._args
        self._rows = {row.name: row for row in load_rows(Path(args.output_dir), held_out)}
        if DIRECT not in self._rows:
            say(f"scoreboard: direct solving and the untrained planner on {len(held_out)} questions")
            self._add(run_direct(held_out, self._executor))
        if UNTRAINED not in self._rows:
            self._plan(UNTRAINED, held_out, adapter=False)
        if args.adapter_path is not None and SUPERVISED not in self._rows:
            self._plan(SUPERVISED, held_out, adapter=True)
        self._executor.worker.take_stats()  # the first training step counts its own calls only

    def after(self, held_out: list[Question]) -> None:
        """The trained planner, and direct solving at its token cost."""
        args = self._args
        say(f"scoreboard: the trained planner on {len(held_out)} questions")
        trained = self._plan(TRAINED, held_out, adapter=True)
        worker = self._executor.worker
        voters = (
            worker.sampler(VOTE_TEMPERATURE, args.seed)
            if isinstance(worker, ServerWorker)
            else self._answerer(adapter=False, max_tokens=args.worker_max_tokens, temperature=VOTE_TEMPERATURE)
        )
        budget = trained.mean("total_tokens")
        direct = self._rows[DIRECT]
        self._add(run_vote(held_out, direct, voters.generate, args.worker_style, budget))
        print("\n" + scoreboard_table(self._summary))
        print(f"scoreboard: {Path(args.output_dir) / 'evaluation.json'} and evaluation.png beside it")

    def _plan(self, name: str, held_out: list[Question], *, adapter: bool) -> Row:
        args = self._args
        planner = self._answerer(adapter=adapter, max_tokens=args.max_completion_length)
        row = run_planner(name, held_out, self._executor, planner.generate, args.planner_style)
        return self._add(row)

    def _answerer(self, *, adapter: bool, max_tokens: int, temperature: float = 0.0) -> LocalModel:
        return LocalModel(
            self._model,
            self._tokenizer,
            adapter=adapter,
            max_tokens=max_tokens,
            batch_tokens=self._args.worker_batch_tokens,
            temperature=temperature,
            seed=self._args.seed,
            cpu_dtype=models.cpu_dtype(self._args),
        )

    def _add(self, row: Row) -> Row:
        """Keep a row, on disk too: a row can take an hour, and a run that is stopped goes on from the next one."""
        self._rows[row.name] = row
        self._summary = save_scoreboard(list(self._rows.values()), Path(self._args.output_dir))
        say(f"  {row.name}: {row.mean('correct'):.1%} in {row.seconds:.0f} s")
        return row
