"""Data files: JSON Lines, JSON lists and parquet, as a single file or in a folder.

In a folder, each split is one file or several numbered parts. Every record must be readable as a `Question`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.grading import parse_gold

SUFFIXES = (".jsonl", ".json", ".parquet")
COLUMNS = ("question", "answer")
BYTE_ORDER_MARK = "\ufeff"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# The name of a numbered part on the Hub, for example train-00000-of-00002.parquet.
_PART = r"-(?P<number>\d+)-of-(?P<count>\d+)"


@dataclass(frozen=True, slots=True)
class Question:
    """A word problem with its answer.

    Attributes:
        question: text of the problem.
        answer: in GSM8K's form: the solution steps, then `#### ` and the number.
        kind: how `common.problems.composed` made the question: "single", "sum" or "chained"; "" for any other question.
        parts: the problems that a composed question consists of, each understandable by itself; () for a single one.
        source: original text of a part whose text was changed; None if it was not changed.
    """

    question: str
    answer: str
    kind: str = ""
    parts: tuple[Question, ...] = ()
    source: str | None = None

    @property
    def steps(self) -> int:
        """Number of lines of the solution before the answer."""
        return sum(bool(line.strip()) for line in self.answer.split("####")[0].splitlines())

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that are known to a reader of this question: its own, and the original texts of its parts."""
        return (self.question, *(part.source or part.question for part in self.parts))


def as_question(row: Any, where: str) -> Question:
    """Convert one record to a `Question`.

    Args:
        row: the record, of any type.
        where: its place in the file, for the error message.

    Raises:
        UserError: if the record is not a question; the message says where and why.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {type(row).__name__}, expected an object with question and answer")
    for name in COLUMNS:
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            what = f"found {value!r:.40} in" if name in row else "there is no"
            ending = value if isinstance(value, (int, float)) else "NUMBER"
            wanted = f"text that ends in '#### {ending}'" if name == "answer" else "text"
            raise UserError(
                f"{where}: {what} column {name!r}, {wanted} is expected (GSM8K's schema: question and answer; columns "
                f"found: {', '.join(map(str, row)) or 'none'})"
            )
    try:
        parse_gold(row["answer"])
    except ValueError as error:
        raise UserError(f"{where}, column 'answer': {error}") from error
    return Question(row["question"], row["answer"])


def local_path(source: str) -> Path:
    """The path that a source names; `~` is the user's home.

    Raises:
        UserError: for a URL, from which nothing is read.
    """
    if _URL.match(source):
        raise UserError(f"--dataset {source}: data are not read from a URL: download the file and name that")
    return Path(source).expanduser()


def is_data_file(path: Path) -> bool:
    """Whether a path ends like a data file."""
    return path.suffix.casefold() in SUFFIXES


def data_files(folder: Path) -> list[Path]:
    """Files in a folder that may contain data, sorted by name."""
    return sorted(child for child in folder.iterdir() if child.is_file() and is_data_file(child))


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split, or its numbered parts in order; [] if there is none.

    `train.jsonl` is the file of the split "train". A name with an addition, such as `train_socratic.jsonl`, is used
    only if there is no file with the plain name and no second such file.

    Raises:
        UserError: if several files are possible, or parts are missing.
    """
    files = data_files(folder)
    plain = [path for path in files if path.stem.casefold() == split.casefold()]
    matches = [(path, re.fullmatch(re.escape(split) + _PART, path.stem, re.IGNORECASE)) for path in files]
    parts = [(path, match) for path, match in matches if match is not None]
    if plain or parts:
        forms = {(path.suffix.casefold(), "") for path in plain}
        forms |= {(path.suffix.casefold(), match["count"]) for path, match in parts}
        if len(forms) > 1 or len(plain) > 1:
            raise _ambiguous(folder, split, [*plain, *(path for path, _ in parts)])
        if parts:
            found = [int(match["number"]) for _, match in parts]
            missing = sorted(set(range(int(parts[0][1]["count"]))) - set(found))
            if missing:
                raise UserError(
                    f"--dataset {folder}: part {missing[0]:05d} of {parts[0][1]['count']} of the split {split!r} is "
                    f"missing (found: {', '.join(path.name for path, _ in parts)}): add it, or name one file"
                )
        return plain or [path for path, _ in parts]
    like = [path for path in files if re.match(re.escape(split) + r"[-_. ]", path.name, re.IGNORECASE)]
    like = [path for path in like if not path.stem.casefold().endswith(("_config", "_info", "_dict", "_state"))]
    if len(like) > 1:
        raise _ambiguous(folder, split, like)
    return like


def read_records(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for every record of a data file: JSON Lines, a list in a .json file, or parquet.

    Args:
        path: of the file.
        columns: those that a record should have. They are not checked here, only named in error messages.

    Raises:
        UserError: for a file of another kind, a file that cannot be read, or a line that is not JSON.
    """
    if not path.is_file():
        raise UserError(f"--dataset {path} does not exist: name a .jsonl or .parquet file, a folder or a Hub id")
    if not is_data_file(path):
        raise UserError(
            f"--dataset {path} is neither .jsonl nor .parquet: convert it, one object with {', '.join(columns)} a line"
        )
    try:
        yield from _parquet_rows(path) if path.suffix.casefold() == ".parquet" else _json_rows(path, columns)
    except OSError as error:
        raise UserError(f"--dataset {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--dataset {path} is not UTF-8 ({error}): save it as UTF-8") from error


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text, without byte-order marks.

    Some editors write such a mark at the beginning of a file. A file joined from several also has them in the middle.

    Raises:
        OSError: if the file cannot be read.
        UnicodeDecodeError: if it is not UTF-8.
    """
    return [line.removeprefix(BYTE_ORDER_MARK) for line in path.read_text(encoding="utf-8").split("\n")]


def _ambiguous(folder: Path, split: str, found: list[Path]) -> UserError:
    return UserError(
        f"--dataset {folder} has several files for the split {split!r} ({', '.join(path.name for path in found)}), and "
        "reading them all would take questions twice: name one of them"
    )


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each line of a JSON Lines file; a .json file may also be one list."""
    lines = read_lines(path)
    if path.suffix.casefold() == ".json" and "".join(lines[:1]).lstrip().startswith("["):
        try:
            records = json.loads("\n".join(lines))
        except (ValueError, RecursionError) as error:
            place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
            raise UserError(f"{place}: not valid JSON ({error}): mend the file") from error
        yield from ((f"{path} item {number}", record) for number, record in enumerate(records, start=1))
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: not valid JSON ({error}): one object a line is expected, with {', '.join(columns)}"
            ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"--dataset {path} is not a parquet file ({error}): copy or download it again") from error
    yield from ((f"{path} row {number}", row) for number, row in enumerate(table.to_pylist(), start=1))
