"""Data files in real forms: byte-order marks, folders of the Hub, configs next to data, parts, repeated rows."""

from __future__ import annotations

import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from common.errors import UserError
from common.problems.planning import load_planning_data
from common.problems.questions import check_source, load_questions

BOM = b"\xef\xbb\xbf"


def row(name: str) -> dict[str, str]:
    return {"question": name, "answer": "#### 1"}


def plan(name: str) -> dict[str, str]:
    return {"SystemPrompt": "Plan.", "UserPrompt": name, "ExpectedOutput": f"plan of {name}"}


def write(path, *rows, mark: bytes = b""):
    if path.suffix.casefold() == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_bytes(mark + json.dumps(rows).encode())
    else:
        path.write_bytes(mark + "".join(json.dumps(entry) + "\n" for entry in rows).encode())
    return path


def questions(source, **options) -> list[str]:
    return [item.question for item in load_questions(str(source), limit=99, **options)]


def planned(source) -> tuple[list[str], list[str]]:
    training, held_out = load_planning_data(str(source), None)
    return [user for _, user, _ in training], [user for _, user, _ in held_out]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "TRAIN.JSONL"])
def test_a_byte_order_mark_is_no_part_of_the_data(name, tmp_path):
    path = write(tmp_path / name, row("a"), row("b"), mark=BOM)
    check_source(str(path))
    assert questions(path) == questions(tmp_path) == ["a", "b"]
    assert planned(write(tmp_path / "plans.jsonl", plan("a"), plan("b"), mark=BOM)) == (["a", "b"], [])


def test_marks_where_files_were_put_together(tmp_path):
    one = write(tmp_path / "one.jsonl", row("a"), mark=BOM).read_bytes()
    both = tmp_path / "both.jsonl"
    both.write_bytes(one + one.replace(b'"a"', b'"b"'))
    assert questions(both) == ["a", "b"]


def test_the_split_alone_is_read_not_another_form_of_the_same_questions(tmp_path):
    for name in ("train", "train_socratic", "test", "test_socratic"):
        write(tmp_path / f"{name}.jsonl", row(f"of {name}"))
    (tmp_path / "training_config.json").write_text("{}")
    (tmp_path / "train_info.json").write_text("{}")
    assert questions(tmp_path) == ["of train"]
    assert questions(tmp_path, split="test") == ["of test"]
    (tmp_path / "train.jsonl").unlink()
    assert questions(tmp_path) == ["of train_socratic"]
    write(tmp_path / "train_main.jsonl", row("c"))
    with pytest.raises(UserError, match=r"train_main\.jsonl, train_socratic\.jsonl.*name one of them"):
        check_source(str(tmp_path))


def test_a_split_in_two_forms_is_one_line(tmp_path):
    write(tmp_path / "train.jsonl", row("a"))
    write(tmp_path / "train.parquet", row("a"))
    for source in (check_source, lambda folder: load_planning_data(folder, None)):
        with pytest.raises(UserError, match=r"train\.jsonl, train\.parquet"):
            source(str(tmp_path))


def test_numbered_parts_are_read_in_order_and_all_of_them(tmp_path):
    write(tmp_path / "train-00001-of-00002.parquet", row("b"))
    write(tmp_path / "test-00000-of-00001.parquet", row("c"))
    with pytest.raises(UserError, match="part 00000 of 00002"):
        check_source(str(tmp_path))
    write(tmp_path / "train-00000-of-00002.parquet", row("a"))
    (tmp_path / "README.md").write_text("# Data")
    assert questions(tmp_path) == ["a", "b"] and questions(tmp_path, split="test") == ["c"]


def test_planning_data_named_as_on_the_hub_and_in_two_kinds_of_file(tmp_path):
    write(tmp_path / "train-00000-of-00001.parquet", plan("a"), plan("b"))
    write(tmp_path / "test.jsonl", plan("c"))
    (tmp_path / "training_config.json").write_text("{}")
    assert planned(tmp_path) == (["a", "b"], ["c"])
    write(tmp_path / "validation.jsonl", plan("d"), mark=BOM)
    assert planned(tmp_path) == (["a", "b"], ["d"])


def test_planning_data_under_another_name_are_read_where_nothing_else_could_be_meant(tmp_path):
    write(tmp_path / "plans.jsonl", plan("a"), plan("b"))
    assert planned(tmp_path) == (["a", "b"], [])
    (tmp_path / "plans.jsonl").rename(tmp_path / "train.jsonl")
    assert planned(tmp_path) == (["a", "b"], []), "without a split to validate on"
    (tmp_path / "train.jsonl").rename(tmp_path / "plans.jsonl")
    write(tmp_path / "more.parquet", plan("b"))
    with pytest.raises(UserError, match=r"more\.parquet, plans\.jsonl"):
        planned(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("plans.jsonl", value) for value in (None, 7, "", ["x"])), ("plans.parquet", None), ("plans.parquet", "")],
)
def test_a_row_without_a_text_is_named_with_its_file(name, value, tmp_path):
    other = {**plan("b"), "ExpectedOutput": value}
    path = write(tmp_path / name, plan("a"), other)
    with pytest.raises(UserError, match="ExpectedOutput") as caught:
        load_planning_data(str(path), None)
    assert (f"{path}:2" if name.endswith("jsonl") else f"{path} row 2") in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("broken.jsonl", '{"SystemPrompt": ', r"broken\.jsonl:1: not valid JSON"),
        ("plans.csv", "a,b", r"plans\.csv is neither .jsonl nor .parquet"),
        ("empty.jsonl", "\n", r"empty\.jsonl holds no row"),
        ("one.jsonl", json.dumps(plan("a")), r"one\.jsonl holds one row only"),
    ],
)
def test_planning_data_that_cannot_be_used_are_named_with_their_own_columns(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_planning_data(str(tmp_path / name), None)
    assert "question" not in str(caught.value)
    if name in ("broken.jsonl", "plans.csv"):
        assert "SystemPrompt, UserPrompt, ExpectedOutput" in str(caught.value)


@pytest.mark.parametrize("source", ["http://x/y.jsonl", "https://huggingface.co/datasets/a/b", "s3://bucket/y.parquet"])
def test_a_url_is_shown_as_it_was_given_with_what_to_do(source):
    whole = re.escape(f"{source}: data are not read from a URL: download")
    for read in (check_source, lambda name: load_planning_data(name, None), lambda name: questions(name)):
        with pytest.raises(UserError, match=f"--dataset {whole}"):
            read(source)
    with pytest.raises(UserError, match=f"--eval-dataset {whole}"):
        check_source(f"multi:{source}", flag="--eval-dataset")


def test_repeated_questions_are_kept_and_told_once(tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", row("a"), row("b"), row("a"))
    assert questions(path) == ["a", "b", "a"]
    assert capsys.readouterr().err.count("1 of 3 questions occurred before") == 1


@pytest.mark.parametrize("source", ["generated:shares", "multi:train.jsonl?parts=2", "reasoning-gym:chain_sum"])
def test_questions_without_plans_are_told_with_the_format_that_makes_some(source):
    with pytest.raises(UserError, match="add --format json-plan"):
        load_planning_data(source, None)
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        load_planning_data("./none.jsonl", None)
