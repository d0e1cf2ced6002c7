"""Many questions to a server: a file of them, resumable, or a scored benchmark."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import evaluation
from common.args import TrainingArgs
from common.artifacts import TRAINING_CONFIG, write_text_atomically
from common.cli import say
from common.data import Question, check_source, is_generated, load_held_out, load_questions
from common.errors import UserError
from common.grading import extract_prediction, parse_gold
from common.prompts import Message
from common.report import append_jsonl, read_jsonl
from common.server import ServerModel
from common.session import Session
from common.similarity import Embeddings, SentenceEncoder
from common.worker import Generation

VOTE_TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Asked:
    """A line of the input file: its number (from 1), the question, the known answer (`#### 7`) and the id, if any."""

    line: int
    question: str
    answer: str | None = None
    id: Any = None


def read_input(path: str) -> list[Asked]:
    """The questions of a JSONL file, each line an object with `question` and perhaps `answer` and `id`.

    An answer is a number, or a text that is one or ends in one as GSM8K's do (`… #### 7`).

    Raises:
        UserError: for the first line that is not such an object.
    """
    source = Path(path)
    if not source.is_file():
        raise UserError(f"--input {path} {'is a folder' if source.is_dir() else 'does not exist'}: name a JSONL file")
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path} cannot be read ({error}): name a JSONL file in UTF-8") from error
    asked = [_asked(path, number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not asked:
        raise UserError(f"--input {path} holds no question: it is empty")
    return asked


def _asked(path: str, number: int, line: str) -> Asked:
    gold: str | None = None
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"found {type(row).__name__}, no object")
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise ValueError("no text in 'question'")
        if row.get("answer") is not None:
            gold = str(row["answer"])
            gold = gold if "####" in gold else f"#### {gold}"
            parse_gold(gold)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            f'--input {path}:{number}: {reason}: one object a line is expected, such as {{"question": "…"}}, '
            'with a known answer {"question": "…", "answer": 7}'
        ) from error
    return Asked(number, question, gold, row.get("id"))


def already_answered(path: Path, asked: Sequence[Asked]) -> dict[int, dict[str, Any]]:
    """Records of an earlier run by line number, without those that failed: these are asked again.

    Raises:
        UserError: when the file cannot be written, or holds something else than answers to these questions.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--output {path} cannot be written: name a file in a folder that exists")
    _check_writable(path)
    if not path.exists():
        return {}
    questions = {item.line: item.question for item in asked}
    found = {}
    try:
        earlier = read_jsonl(path)
    except UserError as error:
        raise UserError(f"--output {path} holds something else than answers ({error}): name another file") from error
    # A torn line is dropped when it is the last one, so a file without any record may still be something else.
    if not earlier and not '{"line": '.startswith(path.read_text(encoding="utf-8", errors="replace")[:9]):
        raise UserError(f"--output {path} holds something else than answers: name another file")
    for record in earlier:
        if questions.get(record.get("line", 0)) != record.get("question"):
            raise UserError(
                f"--output {path} holds answers to other questions than --input, or none at all: name another file"
            )
        if record.get("error") is None:
            found[record["line"]] = record
    return found


def check_scores_folder(path: Path) -> None:
    """Stop when a benchmark's files cannot be written to a folder, or would replace those of another one.

    Raises:
        UserError: with what is there.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file: --benchmark writes into a folder, name one")
    taken = next((name for name in (evaluation.RECORDS, TRAINING_CONFIG) if (path / name).exists()), None)
    if taken is not None:
        raise UserError(f"--output {path} already holds {taken}, which is not overwritten: name another folder")
    above = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    _check_writable(above / f".{path.name}.tmp")


def _check_writable(path: Path) -> None:
    """Raise a `UserError` where a file cannot be written; leaves nothing behind and changes nothing."""
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}): name another place") from error


def answer_file(session: Session, asked: list[Asked], output: Path) -> int:
    """Answer every question that `output` does not hold yet; returns 0, or 1 if some failed.

    Each answer is a line as soon as it is there, so that whatever ends the run, the same command goes on.
    At the end the lines stand in the order of the input.
    """
    from tqdm import tqdm

    records = already_answered(output, asked)
    _write(output, records)  # without the failures of an earlier run
    waiting = [item for item in asked if item.line not in records]
    if records:
        say(f"{len(records)} of {len(asked)} questions were answered before")
    with tqdm(
        total=len(asked), initial=len(records), unit="question", file=sys.stderr, disable=not sys.stderr.isatty()
    ) as bar:

        def done(item: Asked, record: dict[str, Any]) -> None:
            records[item.line] = record
            append_jsonl(output, record)
            bar.update()

        started = time.perf_counter()
        try:
            session.run(_answer_all(session, waiting, done))
        except KeyboardInterrupt:
            bar.close()
            say(f"stopped: {len(records)} of {len(asked)} questions answered; the same command goes on from there")
            return 130
        except ExceptionGroup as errors:
            unwritten = errors.subgroup(OSError)
            if unwritten is None:
                raise
            raise UserError(
                f"--output {output} could not be written ({unwritten.exceptions[0]}) after {len(records)} of "
                f"{len(asked)} questions: make room, then the same command goes on from there",
                exit_code=1,
            ) from errors
    seconds = time.perf_counter() - started
    _write(output, records)
    if waiting:
        say(f"{len(waiting)} questions asked in {seconds:.1f} s, {len(waiting) / seconds:.2f} a second")
    return _say_summary(records, output)


async def _answer_all(session: Session, asked: Sequence[Asked], done: Callable[[Asked, dict[str, Any]], None]) -> None:
    """Answer questions, as many at a time as there may be requests: enough to keep all slots busy."""
    queue: Iterator[Asked] = iter(asked)

    async def work() -> None:
        for item in queue:  # shared by all: each takes the next one
            answer = await session.ask(item.question)
            record = {"line": item.line, **({} if item.id is None else {"id": item.id}), **answer.record()}
            if item.answer is not None:
                gold = parse_gold(item.answer)
                record["gold"] = f"{gold:f}"
                record["correct"] = record["answer"] is not None and extract_prediction(record["answer"]) == gold
            done(item, record)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(session.args.concurrency, len(asked))):
            group.create_task(work())


def _write(output: Path, records: dict[int, dict[str, Any]]) -> None:
    lines = [json.dumps(records[line], ensure_ascii=False) + "\n" for line in sorted(records)]
    if lines or output.exists():
        write_text_atomically(output, "".join(lines))


def _say_summary(records: dict[int, dict[str, Any]], output: Path) -> int:
    failed = [record for record in records.values() if record["error"] is not None]
    answered = [record for record in records.values() if record["error"] is None]
    say(f"{len(answered)} of {len(records)} questions answered: {output}")
    if answered:
        say(f"plans: {plan_shares(answered)}")
    graded = [record["correct"] for record in answered if "correct" in record]
    if graded:
        say(f"correct: {sum(graded)} of {len(graded)} with a known answer")
    if failed:
        say(f"{len(failed)} failed and are asked again by the same command; the first: {failed[0]['error']}")
    return 1 if failed else 0


def plan_shares(records: Sequence[dict[str, Any]]) -> str:
    """How many plans were as asked for, a plan among other text, or none."""
    counts = Counter(record["plan_state"] for record in records)
    return ", ".join(
        f"{counts[state]} {state} ({100 * counts[state] / len(records):.0f}%)"
        for state in ("valid", "repaired", "invalid")
    )


# --- benchmark -----------------------------------------------------------------------------------------------


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
        UserError: when a planner's request fails, because a plan that was never written is no invalid plan.
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

    rows = [evaluation.run_direct(questions, executor)]
    states: dict[str, str] = {}
    for name, model in ((evaluation.UNTRAINED, session.base.name), (evaluation.TRAINED, session.adapter)):
        planner = session.planner_model(model, temperature, seed=0 if temperature else None)
        written: list[Generation] = []
        rows.append(evaluation.run_planner(name, questions, executor, _strict(planner, written), style))
        states[name] = plan_shares([{"plan_state": session.plan_state(plan)} for plan in written])
    sampler = session.worker.sampler(VOTE_TEMPERATURE, seed=0)
    budget = rows[-1].mean("total_tokens")
    rows.append(evaluation.run_vote(questions, rows[0], _strict(sampler, []), session.args.worker_style, budget))

    summary = evaluation.summarise(rows) if output is None else evaluation.save_scoreboard(rows, output)
    print(evaluation.scoreboard_table(summary))
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
