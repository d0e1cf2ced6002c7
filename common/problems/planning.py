"""Published planning data to imitate. Each row has three texts: system prompt, user prompt and expected output."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.problems import composed
from common.problems.files import data_files, local_path, read_records, split_files
from common.problems.questions import is_local

COLUMNS = ("SystemPrompt", "UserPrompt", "ExpectedOutput")
# The first of these splits that exists is used for validation. If none exists, rows are taken from the training split.
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")

Row = tuple[str, str, str]


def load_planning_data(source: str, config: str | None) -> tuple[list[Row], list[Row]]:
    """Rows to imitate, and rows to validate on (maybe none), from a local file or folder, or from the Hub.

    Args:
        source: path or Hub id.
        config: configuration of a data set on the Hub, or None.

    Raises:
        UserError: if the data cannot be read, or a row lacks a text; the message names the file and the row.
    """
    if source.startswith((composed.PREFIX, *composed.GENERATORS)):
        raise UserError(
            f"--dataset {source}: generated and composed questions have no plans of their own: add --format json-plan, "
            "which makes some"
        )
    path = local_path(source)
    if path.is_dir() or is_local(source):
        rows = _read_folder(path) if path.is_dir() else (_read_files(path), [])
        if sum(map(len, rows)) < 2:
            raise UserError(f"--dataset {source} holds one row only: add rows, one of them is kept to validate on")
        return rows
    import datasets

    try:
        table = datasets.load_dataset(source, config)
    except Exception as error:
        first = str(error).strip().splitlines()
        raise UserError(
            f"data set {source!r} could not be loaded ({type(error).__name__}: {first[0] if first else ''}): check its "
            "name and the network, or pass a local .jsonl or .parquet file with --dataset",
            exit_code=1,
        ) from error
    training = "train" if "train" in table else next(iter(table))
    held_out = next((name for name in HELD_OUT_SPLITS if name in table and name != training), None)
    splits = [name for name in (training, held_out) if name is not None]
    found = [
        _rows(((f"{source} {name} row {number}", row) for number, row in enumerate(table[name], 1)), f"{source} {name}")
        for name in splits
    ]
    return found[0], found[1] if held_out is not None else []


def _read_folder(folder: Path) -> tuple[list[Row], list[Row]]:
    training = split_files(folder, "train")
    if not training:
        others = [path for path in data_files(folder) if path.suffix.casefold() != ".json"]
        if len(others) != 1:
            names = ", ".join(path.name for path in data_files(folder)) or "none"
            raise UserError(
                f"--dataset {folder} has no file of the split 'train' (data files found: {names}): name the file itself"
            )
        return _read_files(others[0]), []
    held_out = next((files for name in HELD_OUT_SPLITS if (files := split_files(folder, name))), [])
    return _read_files(*training), _read_files(*held_out) if held_out else []


def _read_files(*paths: Path) -> list[Row]:
    records = (record for path in paths for record in read_records(path, COLUMNS))
    return _rows(records, ", ".join(map(str, paths)))


def _rows(records: Iterable[tuple[str, Any]], source: str) -> list[Row]:
    found = []
    for where, row in records:
        if not isinstance(row, dict):
            raise UserError(f"{where}: found {type(row).__name__}, expected an object with {', '.join(COLUMNS)}")
        for name in COLUMNS:
            if not isinstance(row.get(name), str):
                what = f"found {row[name]!r:.40}" if name in row else f"columns found: {', '.join(map(str, row))}"
                raise UserError(
                    f"{where}: no text in column {name} ({what}): {', '.join(COLUMNS)} are expected as text; for "
                    "questions with answers use --format json-plan"
                )
        if not row["ExpectedOutput"].strip():
            raise UserError(f"{where}: ExpectedOutput is empty, so there is nothing to imitate: leave the row out")
        found.append((row["SystemPrompt"], row["UserPrompt"], row["ExpectedOutput"]))
    if not found:
        raise UserError(f"--dataset {source} holds no row to imitate: it is empty")
    return found
