"""Ask a server a file of questions. A run that was stopped can be continued."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import counted, say
from common.errors import UserError
from common.grading import parse_gold, parse_number
from common.inference.session import Session, plan_shares
from common.reports.jsonl import append_jsonl, read_jsonl
from common.runs.files import check_file_writable, remove_unfinished_beside, write_text_atomically


@dataclass(frozen=True, slots=True)
class Asked:
    """A line of the input file.

    Attributes:
        line: its number, from 1.
        question: the word problem.
        answer: the known answer, as "#### 7", or None.
        id: the line's own id, or None.
    """

    line: int
    question: str
    answer: str | None = None
    id: Any = None


def read_input(path: str) -> list[Asked]:
    """The questions of a JSON Lines file. Each line is an object with `question`, and maybe `answer` and `id`.

    An answer is a number, or a text that is one or ends in one like GSM8K's (`… #### 7`).

    Raises:
        UserError: if the file cannot be read, is empty, or has a line that is not such an object (the first is shown).
    """
    source = Path(path)
    if not source.is_file():
        raise UserError(f"--input {path} {'is a folder' if source.is_dir() else 'does not exist'}: name a JSONL file")
    try:
        text = source.read_text(encoding="utf-8-sig")  # Windows editors write a byte-order mark at the beginning
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
            if "####" not in gold:
                if parse_number(gold) is None:
                    raise ValueError(f"no number in 'answer', found {gold[:80]!r}")
                gold = f"#### {gold}"
            parse_gold(gold)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            f'--input {path}:{number}: {reason}: one object a line is expected, such as {{"question": "…"}}, '
            'with a known answer {"question": "…", "answer": 7}'
        ) from error
    return Asked(number, question, gold, row.get("id"))


def already_answered(path: Path, asked: Sequence[Asked]) -> dict[int, dict[str, Any]]:
    """Records of an earlier run by line number. Failed ones are left out, because they are asked again.

    Args:
        path: the output file.
        asked: the questions of the input file.

    Raises:
        UserError: if the file cannot be written, or holds anything but answers to these questions.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--output {path} cannot be written: name a file in a folder that exists")
    check_file_writable(path, "--output")
    if not path.exists():
        return {}
    questions = {item.line: item.question for item in asked}
    found = {}
    try:
        earlier = read_jsonl(path)
    except UserError as error:
        raise UserError(f"--output {path} holds something else than answers ({error}): name another file") from error
    # An incomplete last line is dropped, so a file without any record may still be something else.
    if not earlier and not '{"line": '.startswith(path.read_text(encoding="utf-8", errors="replace")[:9]):
        raise UserError(f"--output {path} holds something else than answers: name another file")
    for record in earlier:
        line = record.get("line")
        if not isinstance(line, int) or line not in questions or questions[line] != record.get("question"):
            raise UserError(
                f"--output {path} holds answers to other questions than --input, or none at all: name another file"
            )
        if record.get("error") is None:
            found[line] = record
    return found


def answer_file(session: Session, asked: list[Asked], output: Path) -> int:
    """Answer every question that `output` does not hold yet.

    Each answer is written as soon as it arrives, so after any stop the same command continues. At the end the lines
    are in the order of the input.

    Args:
        session: connected to the server.
        asked: the questions.
        output: the JSON Lines file for the answers.

    Returns:
        The exit code: 0; 1 if some questions failed; 130 if Ctrl-C stopped it.

    Raises:
        UserError: with exit code 1, if the file cannot be written any more.
    """
    from tqdm import tqdm

    records = already_answered(output, asked)
    with _room_for(output, records, len(asked)):
        remove_unfinished_beside(output)
        _write(output, records)  # drops the failures of an earlier run
    waiting = [item for item in asked if item.line not in records]
    if records:
        say(f"answered before: {len(records)} of {counted(len(asked), 'question')}")
    with tqdm(
        total=len(asked), initial=len(records), unit="question", file=sys.stderr, disable=not sys.stderr.isatty()
    ) as bar:

        def done(item: Asked, record: dict[str, Any]) -> None:
            records[item.line] = record
            append_jsonl(output, record)
            bar.update()

        started = time.perf_counter()
        try:
            with _room_for(output, records, len(asked)):
                session.run(_answer_all(session, waiting, done))
        except KeyboardInterrupt:
            bar.close()
            of = counted(len(asked), "question")
            say(f"stopped: {len(records)} of {of} answered; the same command goes on from there")
            return 130
    seconds = time.perf_counter() - started
    with _room_for(output, records, len(asked)):
        _write(output, records)
    if waiting:
        say(f"{counted(len(waiting), 'question')} asked in {seconds:.1f} s, {len(waiting) / seconds:.2f} a second")
    return _say_summary(records, output)


@contextmanager
def _room_for(output: Path, records: Mapping[int, object], of: int) -> Iterator[None]:
    """Report a failed write in one line, also if it is one of the exceptions of a task group.

    Raises:
        UserError: with exit code 1.
    """
    try:
        yield
    except (OSError, ExceptionGroup) as error:
        unwritten = error.subgroup(OSError) if isinstance(error, ExceptionGroup) else None
        if isinstance(error, ExceptionGroup) and unwritten is None:
            raise
        reason = error if unwritten is None else unwritten.exceptions[0]
        raise UserError(
            f"--output {output} could not be written ({reason}) after {len(records)} of {counted(of, 'question')}: "
            "make room, then the same command goes on from there",
            exit_code=1,
        ) from error


async def _answer_all(session: Session, asked: Sequence[Asked], done: Callable[[Asked, dict[str, Any]], None]) -> None:
    """Answer questions, as many at a time as requests are allowed, so that all request slots stay busy."""
    queue: Iterator[Asked] = iter(asked)

    async def work() -> None:
        for item in queue:  # shared by all workers: each takes the next question
            answer = await session.ask(item.question)
            record = {"line": item.line, **({} if item.id is None else {"id": item.id}), **answer.record()}
            if item.answer is not None:
                gold = parse_gold(item.answer)
                record["gold"] = f"{gold:f}"
                record["correct"] = answer.result.error is None and answer.result.number == gold
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
    say(f"{len(answered)} of {counted(len(records), 'question')} answered: {output}")
    if answered:
        say(f"plans: {plan_shares(answered)}")
    graded = [record["correct"] for record in answered if "correct" in record]
    if graded:
        say(f"correct: {sum(graded)} of {len(graded)} with a known answer")
    if failed:
        say(f"{len(failed)} failed, to be asked again by the same command; the first: {failed[0]['error']}")
    return 1 if failed else 0
