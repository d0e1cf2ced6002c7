"""Run the scoreboard of training with the models of a server as planner and worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from common.cli import counted, say
from common.errors import UserError
from common.evaluation.fingerprint import digest, direct_parts, planner_parts, vote_parts, worker_prompts
from common.evaluation.scoreboard import (
    PARTS,
    RECORDS,
    TRAINED,
    UNTRAINED,
    VOTE_TEMPERATURE,
    Row,
    parts_of,
    run_direct,
    run_planner,
    run_vote,
    save_scoreboard,
    summarise,
    votes_for,
)
from common.evaluation.table import scoreboard_table
from common.generation import Generation
from common.inference.session import Session, plan_shares
from common.inference.trained_settings import benchmark_source
from common.pipeline import PipelineExecutor
from common.problems.questions import Question, check_source, is_generated, load_held_out, load_questions
from common.prompts import Message, planner_messages
from common.runs import storage
from common.runs.files import check_file_writable
from common.runs.folder import check_no_others
from common.runs.record import TRAINING_CONFIG
from common.settings.grpo import TrainingArgs
from common.similarity import Embeddings, SentenceEncoder
from common.workers.remote import ServerModel


def check_scores_folder(path: Path) -> None:
    """Check that the files of a benchmark can be written to a folder, and would neither replace nor join others.

    Raises:
        UserError: if `path` is a file or cannot be written, or the folder already holds files.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file: --benchmark writes into a folder, name one")
    taken = next((name for name in (RECORDS, TRAINING_CONFIG) if (path / name).exists()), None)
    if taken is not None:
        raise UserError(f"--output {path} already holds {taken}, which is not overwritten: name another folder")
    check_no_others(path, "--output")
    above = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    check_file_writable(above / f".{path.name}.tmp", "--output")


def held_out_questions(session: Session) -> list[Question]:
    """The questions of the benchmark: the test split of a data set, or generated ones that training did not use.

    Raises:
        UserError: if there are none.
    """
    trained = TrainingArgs.from_dict({key: value for key, value in session.trained.items() if value is not None})
    source = benchmark_source(session.args, session.trained)
    check_source(source, "test")
    # Generated problems that training used are left out; files and the Hub have a test split.
    seen = (
        load_questions(trained.dataset, limit=trained.max_samples, seed=trained.seed)
        if is_generated(source) and trained.dataset == source
        else []
    )
    trained.dataset, trained.eval_dataset, trained.eval_samples = source, source, session.args.samples
    trained.dataset_split = "test"
    return load_held_out(trained, seen)


def benchmark(session: Session, temperature: float, output: Path | None) -> int:
    """Run the scoreboard with the base model alone, and with each planner, and print it.

    Args:
        session: connected to the server.
        temperature: of the plans; the worker is greedy.
        output: folder for the results, or None.

    Returns:
        The exit code: 0, or 1 if some requests failed.

    Raises:
        UserError: if all requests to a model failed, if the server reports no token counts, or if the disk is full.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    questions = held_out_questions(session)
    encoder = SentenceEncoder(TrainingArgs.embedding_model)
    encoder.load()
    executor = session.pipeline(Embeddings(encoder))
    how = "greedily" if temperature == 0 else f"at temperature {temperature:g}"
    say(f"{counted(len(questions), 'question')} to {session.base.name} and {session.adapter}, plans {how}")

    rows = _rows(session, questions, executor, temperature)
    summary = summarise([row for row, _ in rows])
    print(scoreboard_table(summary))
    schema = session.args.structured and session.server.takes_schema
    for row, written in rows:
        if written:
            shares = plan_shares([{"plan_state": session.plan_state(plan)} for plan in written])
            print(f"plans of the {row.name}: {shares}{', asked for by JSON schema' if schema else ''}")
    if output is not None:
        with storage.explained(output, lambda: "the results are not saved: only the table above is left"):
            save_scoreboard([row for row, _ in rows], output)
    alone = summary.get("composed", {}).get("parts_alone") or {"errors": 0}
    return 1 if alone["errors"] or any(row["errors"] for row in summary["rows"].values()) else 0


def _rows(
    session: Session, questions: Sequence[Question], executor: PipelineExecutor, temperature: float
) -> list[tuple[Row, list[Generation]]]:
    """The rows of the scoreboard, each with the plans that were written for it.

    Raises:
        UserError: if all requests to a model failed, or the server reports no token counts.
    """
    args, seed = session.args, 0
    worker = digest([session.worker.server.endpoint.url, session.worker.model])
    asked = worker_prompts(args.worker_style, args.worker_context, args.plan_to_worker)
    always = direct_parts(questions, worker, asked, args.worker_max_tokens)
    direct = run_direct(questions, executor)
    _check_direct(direct, session.worker)
    direct.fingerprint = always
    rows: list[tuple[Row, list[Generation]]] = [(direct, [])]
    for name, model in ((UNTRAINED, session.base.name), (TRAINED, session.adapter)):
        planner = session.planner_model(model, temperature, seed=seed if temperature else None)
        written: list[Generation] = []
        row = run_planner(name, questions, executor, _recorded(planner, written), args.planner_style)
        row.fingerprint = {
            **always,
            "planner": digest([session.server.endpoint.url, model, temperature, seed, args.structured]),
            **planner_parts(
                planner_messages("{question}", args.planner_style, args.worker_context),
                [args.max_tokens, args.max_subproblems, args.max_subproblem_chars],
                TrainingArgs.embedding_model,
            ),
        }
        rows.append((row, written))
    budget = rows[-1][0].mean("total_tokens")
    sampler = session.worker.sampler(VOTE_TEMPERATURE, seed=seed)
    count = votes_for(budget, direct)
    vote = run_vote(questions, direct, sampler.generate, args.worker_style, count)
    vote.seconds += direct.seconds
    vote.fingerprint = {**always, **vote_parts(count, VOTE_TEMPERATURE, seed)}
    rows.append((vote, []))
    if parts := parts_of(questions):
        alone = run_direct(parts, executor, PARTS)
        alone.fingerprint = direct_parts(parts, worker, asked, args.worker_max_tokens)
        rows.append((alone, []))
    return rows


def _check_direct(direct: Row, worker: ServerModel) -> None:
    """Raise a UserError if direct solving gave no result to compare with."""
    answered = [record for record in direct.records if record["error"] is None]
    if not answered:
        raise UserError(_all_failed(worker.model, direct.records[0]["error"]), exit_code=1)
    if all(record["total_tokens"] is None for record in answered):
        raise UserError(
            f"{worker.server.endpoint.url} reports no token counts, so there is no fair scoreboard: direct "
            "solving would have to get the tokens that the planner costs: benchmark on another server, such as vLLM",
            exit_code=1,
        )


def _all_failed(model: str, first: str) -> str:
    return f"every request to {model} failed, so there is no scoreboard; the first: {first}"


def _recorded(
    model: ServerModel, written: list[Generation]
) -> Callable[[Sequence[Sequence[Message]]], list[Generation]]:
    """A model's `generate` that also stores its completions in `written`, and raises if all requests failed."""

    def generate(requests: Sequence[Sequence[Message]]) -> list[Generation]:
        answers = model.generate(requests)
        written.extend(answer for answer in answers if answer.error is None)
        if not written:
            raise UserError(_all_failed(model.model, str(answers[0].error)), exit_code=1)
        return answers

    return generate
