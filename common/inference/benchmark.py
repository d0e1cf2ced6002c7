"""The scoreboard of training, with a server's models as planners and worker."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from common.cli import say
from common.errors import UserError
from common.evaluation.scoreboard import (
    RECORDS,
    TRAINED,
    UNTRAINED,
    VOTE_TEMPERATURE,
    run_direct,
    run_planner,
    run_vote,
    save_scoreboard,
    summarise,
)
from common.evaluation.table import scoreboard_table
from common.generation import Generation
from common.inference.session import Session, plan_shares
from common.problems.questions import Question, check_source, is_generated, load_held_out, load_questions
from common.prompts import Message
from common.runs.files import check_file_writable
from common.runs.record import TRAINING_CONFIG
from common.settings.grpo import TrainingArgs
from common.similarity import Embeddings, SentenceEncoder
from common.workers.remote import ServerModel


def check_scores_folder(path: Path) -> None:
    """Stop when a benchmark's files cannot be written to a folder, or would replace those of another one.

    Raises:
        UserError: with what is there.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file: --benchmark writes into a folder, name one")
    taken = next((name for name in (RECORDS, TRAINING_CONFIG) if (path / name).exists()), None)
    if taken is not None:
        raise UserError(f"--output {path} already holds {taken}, which is not overwritten: name another folder")
    above = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    check_file_writable(above / f".{path.name}.tmp", "--output")


def held_out_questions(session: Session) -> list[Question]:
    """The benchmark's questions: the test split of a data set, or generated ones that training never saw.

    Raises:
        UserError: where there are none.
    """
    trained = TrainingArgs.from_dict({key: value for key, value in session.trained.items() if value is not None})
    source = session.args.dataset or trained.eval_dataset or trained.dataset
    check_source(source, "test")
    # Of generated problems those that training drew are left out; files and the Hub have their test split.
    seen = (
        load_questions(trained.dataset, limit=trained.max_samples, seed=trained.seed)
        if is_generated(source) and trained.dataset == source
        else []
    )
    trained.dataset, trained.eval_dataset, trained.eval_samples = source, source, session.args.samples
    trained.dataset_split = "test"
    return load_held_out(trained, seen)


def benchmark(session: Session, temperature: float, output: Path | None) -> int:
    """The scoreboard of training, with a server's models as planners and worker; returns 0.

    Raises:
        UserError: when a planner's request fails, because a plan that was never written is no invalid plan; for a
            server that tells no token counts.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    questions = held_out_questions(session)
    encoder = SentenceEncoder(TrainingArgs.embedding_model)
    encoder.load()
    executor = session.pipeline(Embeddings(encoder))
    style = session.args.planner_style
    how = "greedily" if temperature == 0 else f"at temperature {temperature:g}"
    say(f"{len(questions)} questions to {session.base.name} and {session.adapter}, plans {how}")

    rows = [run_direct(questions, executor)]
    if math.isnan(rows[0].mean("total_tokens")):
        raise UserError(
            f"{session.worker.server.endpoint.url} tells no token counts, so there is no fair scoreboard: direct "
            "solving would have to get the tokens that the planner costs: benchmark on another server, such as vLLM",
            exit_code=1,
        )
    states: dict[str, str] = {}
    for name, model in ((UNTRAINED, session.base.name), (TRAINED, session.adapter)):
        planner = session.planner_model(model, temperature, seed=0 if temperature else None)
        written: list[Generation] = []
        rows.append(run_planner(name, questions, executor, _strict(planner, written), style))
        states[name] = plan_shares([{"plan_state": session.plan_state(plan)} for plan in written])
    sampler = session.worker.sampler(VOTE_TEMPERATURE, seed=0)
    budget = rows[-1].mean("total_tokens")
    rows.append(run_vote(questions, rows[0], _strict(sampler, []), session.args.worker_style, budget))

    summary = summarise(rows) if output is None else save_scoreboard(rows, output)
    print(scoreboard_table(summary))
    schema = session.args.structured and session.server.takes_schema
    for name, shares in states.items():
        print(f"plans of the {name}: {shares}{', asked for by JSON schema' if schema else ''}")
    failures = sum(row["worker_failures"] for row in summary["rows"].values())
    if failures:
        first = next(record["error"] for row in rows for record in row.records if record["error"] is not None)
        say(f"warning: {failures} answers failed and count as wrong; the first: {first}")
    return 0


def _strict(model: ServerModel, written: list[Generation]) -> Callable[[Sequence[Sequence[Message]]], list[Generation]]:
    """A model's `generate` that stops at failures, and keeps what was written."""

    def generate(requests: Sequence[Sequence[Message]]) -> list[Generation]:
        answers = model.generate(requests)
        failed = [answer.error for answer in answers if answer.error is not None]
        if failed:
            raise UserError(
                f"{len(failed)} of {len(answers)} requests to {model.model} failed, so there is no fair scoreboard; "
                f"the first: {failed[0]}",
                exit_code=1,
            )
        written.extend(answers)
        return answers

    return generate
