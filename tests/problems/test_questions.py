"""Questions from files and generators, and no held-out question is used in training."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from conftest import ROOT

from common.errors import UserError
from common.grading import parse_gold
from common.problems import generated
from common.problems.demonstrations import demonstrations
from common.problems.questions import check_disjoint, check_source, fingerprint, load_held_out, load_questions
from common.settings.grpo import TrainingArgs

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
SOCRATIC = ROOT.parent / "shared" / "data" / "gsm8k_socratic"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside this checkout (../shared/data)")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_gives_the_split_that_was_asked_for(tmp_path):
    write(tmp_path / "train.jsonl", [{"question": "a", "answer": "#### 1"}])
    write(tmp_path / "test.jsonl", [{"question": "b", "answer": "#### 2"}])
    assert [q.question for q in load_questions(str(tmp_path), limit=9)] == ["a"]
    assert [q.question for q in load_questions(str(tmp_path), limit=9, split="test")] == ["b"]
    with pytest.raises(UserError, match=r"test\.jsonl, train\.jsonl"):
        load_questions(str(tmp_path), limit=9, split="validation")


def test_parquet_equals_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    write(tmp_path / "train.jsonl", rows)
    both = [load_questions(str(tmp_path / name), limit=4) for name in ("train.parquet", "train.jsonl")]
    assert both[0] == both[1] and len(both[0]) == 4


def test_the_fingerprint_knows_text_and_order(tmp_path):
    a, b = islice(generated.shares("generated:shares", 1), 2)
    from common.problems.questions import Question

    one, two = Question(a.question, a.answer), Question(b.question, b.answer)
    assert fingerprint([one, two]) == fingerprint([one, two]) != fingerprint([two, one])


@pytest.mark.parametrize("source", ["generated:shares", "reasoning-gym:chain_sum?min_terms=3&max_terms=3"])
def test_generated_questions_are_distinct_seeded_and_solvable(source):
    first = load_questions(source, limit=60, seed=1)
    assert first == load_questions(source, limit=60, seed=1) != load_questions(source, limit=60, seed=2)
    assert len({item.question for item in first}) == 60
    for item in first:
        parse_gold(item.answer)


def test_held_out_questions_never_overlap(tmp_path, capsys):
    args = TrainingArgs(dataset="generated:shares?people=2&low=1&high=2", eval_samples=200)
    training = load_questions(args.dataset, limit=100, seed=args.seed)
    held_out = load_held_out(args, training)
    assert len(held_out) == 200
    alone = TrainingArgs(dataset=args.dataset, eval_samples=1)
    for known, told in (
        (training[:1], f"1 held-out question from {args.dataset}: none of them is among the 1 training question\n"),
        ([], f"1 held-out question from {args.dataset}\n"),
    ):
        capsys.readouterr()
        load_held_out(alone, known)
        assert capsys.readouterr().err == told
    check_disjoint([q.question for q in training], [q.question for q in held_out])
    path = write(tmp_path / "train.jsonl", [{"question": "How many?", "answer": "#### 1"}])
    with pytest.raises(UserError, match="--eval-dataset"):
        load_held_out(TrainingArgs(dataset=str(path), eval_samples=1), [])
    other = write(tmp_path / "other.jsonl", [{"question": "how  many", "answer": "#### 1"}])
    clash = TrainingArgs(dataset=str(path), eval_dataset=str(other), eval_samples=1)
    with pytest.raises(UserError, match="the training set holds 1 held-out problem too"):
        load_held_out(clash, load_questions(str(path), limit=1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("generated:sums", "no generated family"),
        ("generated:shares?people=99", "between 2 and 10"),
        ("generated:shares?folk=4", "people=4"),
        ("generated:shares?low=9&high=1", "low not above high"),
        ("reasoning-gym:nothing", "no task 'nothing'"),
    ],
)
def test_generators_say_what_they_would_take(source, message):
    with pytest.raises(UserError, match=message):
        check_source(source)


def test_reasoning_gym_tells_its_options_and_near_tasks_that_can_be_used():
    with pytest.raises(UserError) as caught:
        load_questions("reasoning-gym:chain_sum?nope=2", limit=2)
    assert str(caught.value) == (
        "--dataset reasoning-gym:chain_sum?nope=2: chain_sum has no option nope, its options are min_terms, max_terms, "
        "min_digits, max_digits, allow_negation"
    )
    with pytest.raises(UserError, match=r"chain_sum refuses these options: .*min_terms must be positive"):
        load_questions("reasoning-gym:chain_sum?min_terms=0", limit=2)
    for name, near in (("chain_sums", "chain_sum, "), ("ransom_notes", "chain_sum, gsm_symbolic")):
        with pytest.raises(UserError, match=f"such as {near}") as caught:
            check_source(f"reasoning-gym:{name}")
        for task in str(caught.value).split("such as ")[1].split(", "):
            assert load_questions(f"reasoning-gym:{task}", limit=3)


@pytest.mark.parametrize("source", ["generated:shares", "multi:generated:shares", "reasoning-gym:chain_sum"])
def test_more_generated_questions_than_anybody_uses_are_refused_at_once(source):
    with pytest.raises(UserError, match="100,000,000 generated questions are too many, at most 100,000"):
        load_questions(source, limit=100_000_000)


def test_a_source_with_few_different_questions_gives_them_all_and_ends(capsys):
    """It has 10 × 9 orders of two names and 6 things; it was asked for 20 times the limit before."""
    assert len(load_questions("generated:shares?people=2&low=1&high=1", limit=50_000)) == 540
    assert "making 50,000 questions" in capsys.readouterr().err


def test_demonstrations_are_varied_and_marked_by_no_kind_of_plan():
    items = load_questions("generated:shares", limit=200, seed=3)
    plans = [plan for _, plan in demonstrations(items, seed=1)]
    kinds = [len(plan.subproblems) for plan in plans]
    assert len(plans) == 200
    assert all(0.1 < kinds.count(kind) / 200 < 0.65 for kind in (0, 1, 2))
    assert plans == [plan for _, plan in demonstrations(items, seed=1)]


@needs_gsm8k
def test_real_gsm8k_loads_whole():
    assert len(load_questions(str(GSM8K), limit=10_000)) == 7473
    assert len(load_questions(str(GSM8K), limit=10_000, split="test")) == 1319


@needs_gsm8k
def test_socratic_plans_are_clean():
    items = load_questions(str(SOCRATIC), limit=2000)
    found = list(demonstrations(items, seed=0))
    assert 0.9 * len(items) < len(found) <= len(items)
    split = [plan for _, plan in found if plan.should_decompose]
    assert 0.6 < len(split) / len(found) < 0.9
    for plan in split:
        assert len(plan.subproblems) >= 2
        assert len({part.casefold() for part in plan.subproblems}) == len(plan.subproblems)
        assert all(part.endswith("?") and "**" not in part for part in plan.subproblems)
