"""Composed questions: a seed always gives the same ones, no text is in two splits, and their answers are right."""

from __future__ import annotations

import json
import re
from decimal import Decimal

import pytest
from conftest import ROOT

from common.errors import UserError
from common.grading import parse_gold
from common.plans import parse_planner_output
from common.problems import chained, composed
from common.problems.demonstrations import COMPOSED_KINDS, SINGLE_DIRECT_SHARE, demonstrations
from common.problems.questions import Question, check_source, is_generated, load_held_out, load_questions
from common.reports.jsonl import append_jsonl
from common.settings.grpo import TrainingArgs
from tests.benchmarks import composed as benchmark

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside this checkout (../shared/data)")

THREE_STEPS = "4 * 2 = <<4*2=8>>8\n8 + 1 = <<8+1=9>>9\n9 * 3 = <<9*3=27>>27\n#### 27"
# A problem in which one of the numbers can be replaced by another problem's answer.
USES = Question(
    "Mia folds 12 cranes a day and gives away 3 of them. How many has she after 5 days?",
    "She keeps 12-3 = <<12-3=9>>9 a day.\nAfter five days she has 9*5 = <<9*5=45>>45.\n#### 45",
)


def problems(split: str, count: int) -> list[dict[str, str]]:
    """Problems with one step and with three. No text occurs in two splits."""
    short = [
        {"question": f"In {split} a box holds {n + 3} pens and {n} cups. How many things?", "answer": f"{n + 3} + {n} = <<{n + 3}+{n}={2 * n + 3}>>{2 * n + 3}\n#### {2 * n + 3}"}
        for n in range(2, count + 2)
    ]  # fmt: skip
    long = [{"question": f"Long one {n} of {split}?", "answer": THREE_STEPS} for n in range(count // 4)]
    return [row for pair in zip(short, long + short[len(long) :], strict=True) for row in pair]


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in problems(split, 40))
        (tmp_path / f"{split}.jsonl").write_text(text)
    return tmp_path


def test_a_sum_holds_its_problems_and_asks_for_the_sum_of_their_answers(folder, capsys):
    found = load_questions(f"multi:{folder}?parts=2-3&single=0.3&max_steps=2", limit=99, seed=1)
    assert found == load_questions(f"multi:{folder}?parts=2-3&single=0.3&max_steps=2", limit=99, seed=1)
    assert found != load_questions(f"multi:{folder}?parts=2-3&single=0.3&max_steps=2", limit=99, seed=2)
    assert found[:5] == load_questions(f"multi:{folder}?parts=2-3&single=0.3&max_steps=2", limit=5, seed=1)
    assert {len(item.parts) for item in found} == {0, 2, 3}
    used = [part.question for item in found for part in (item.parts or [item])]
    assert len(used) == len(set(used)) >= 38, "each problem once, and few are left over"
    assert not any(text.startswith("Long") for text in used), "three steps are more than two"
    for item in found:
        assert item.kind == (composed.SUM if item.parts else composed.SINGLE)
        assert composed.count_parts(item.question) == len(item.parts)
        assert "In test" not in item.question
        if item.parts:
            assert parse_gold(item.answer) == sum(parse_gold(part.answer) for part in item.parts)
            assert composed.part_texts(item.question) == [part.question for part in item.parts]
            assert item.question.endswith(f"and ({'ABC'[len(item.parts) - 1]})?")
    told = capsys.readouterr().err
    assert re.search(r"\d+ of 1 problem, \d+ of 2 problems, \d+ of 3 problems; its source gives no more", told)


def test_held_out_questions_share_no_problem_with_training(folder):
    args = TrainingArgs(dataset=f"multi:{folder}?parts=2&single=0.2", max_samples=50, eval_samples=20)
    training = load_questions(args.dataset, limit=args.max_samples, seed=args.seed)
    held_out = load_held_out(args, training)
    assert len(held_out) == 20 and all("In test" in item.question or "of test" in item.question for item in held_out)
    one = folder / "train.jsonl"
    with pytest.raises(UserError, match="--eval-dataset"):
        load_held_out(TrainingArgs(dataset=f"multi:{one}", eval_samples=1), training)
    for source in (f"multi:{one}?parts=3", str(one)):  # the same problems in other compositions, or single
        with pytest.raises(UserError, match=r"the training set holds \d+ held-out problems too"):
            load_held_out(TrainingArgs(dataset=args.dataset, eval_dataset=source, eval_samples=30), training)


def test_generated_problems_can_be_composed_and_never_overlap():
    source = "multi:generated:shares?people=2&high=4&parts=2"
    assert is_generated(source)
    args = TrainingArgs(dataset=source, eval_samples=60)
    training = load_questions(source, limit=100, seed=args.seed)
    held_out = load_held_out(args, training)
    texts = [part.question for item in [*training, *held_out] for part in item.parts]
    assert len(training) == 100 and len(held_out) == 60 and len(set(texts)) == len(texts) == 320
    assert max(int(n) for n in re.findall(r"\d+", " ".join(texts))) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?parts=1", "parts=1 must be a number from 2 to 8, or a range"),
        ("?parts=3-2", "parts=3-2 must"),
        ("?parts=9", "parts=9 must"),
        ("?single=1", "single=1 must be a share from 0 to below 1"),
        ("?single=nan", "single=nan must"),
        ("?max_steps=0", "max_steps=0 must be a whole number from 1"),
        ("?kind=product", "kind=product must be sum or chained"),
        ("?kind=chained&parts=3", "takes two problems"),
        ("?part=2", "found part=2, the options are parts, single, max_steps, kind"),
    ],
)
def test_wrong_options_are_told_in_one_line_before_anything_is_read(options, message, folder):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        check_source(f"multi:{folder}{options}", flag="--eval-dataset")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--eval-dataset multi:")
    for source, wrong in (("multi:", "has to be named"), ("multi:multi:x", "has to be named")):
        with pytest.raises(UserError, match=wrong):
            check_source(source)
    for source, wrong in (
        (
            "multi:generated:shares?kin=sum",
            "found kin=sum, the options are parts, single, max_steps, kind, and of generated",
        ),
        ("multi:generated:shares?parts=2&people=3&parts=3", "parts is given twice"),
        ("generated:shares?low=1&low=2", "low is given twice"),
        ("multi:generated:shares?kind=chained", "annotated as GSM8K's"),
        ("multi:reasoning-gym:chain_sum?kind=chained", "annotated as GSM8K's"),
    ):
        with pytest.raises(UserError, match=wrong):
            check_source(source)
    with pytest.raises(
        UserError, match=r"chain_sum has no option kin.* \(those of multi: are parts, single, max_steps, kind\)"
    ):
        load_questions("multi:reasoning-gym:chain_sum?kin=sum", limit=2)
    with pytest.raises(UserError, match="people must lie"):
        check_source("multi:generated:shares?people=99&parts=2")
    (folder / "one.jsonl").write_text(json.dumps(problems("train", 4)[0]))
    (folder / "plain.jsonl").write_text(
        "".join(json.dumps({"question": f"Q{n}?", "answer": "#### 5"}) + "\n" for n in range(9))
    )
    with pytest.raises(UserError, match=r"gives no question.*annotated as GSM8K's are"):
        load_questions(f"multi:{folder / 'plain.jsonl'}?kind=chained", limit=5)
    with pytest.raises(UserError, match="gives no question"):
        load_questions(f"multi:{folder / 'one.jsonl'}?parts=2", limit=5)


def test_a_chained_question_uses_the_first_answer_and_its_gold_is_computed_anew():
    first = Question("Ada has 4 apples and buys 16. How many has she?", "4 + 16 = <<4+16=20>>20\n#### 20")
    found = composed.chain(first, USES)
    assert found is not None and found.kind == composed.CHAINED
    assert "(B) Mia folds X cranes a day and gives away 3 of them." in found.question
    assert found.question.endswith("X in (B) is the answer to (A). What is the answer to (B)?")
    assert composed.is_chained(found.question) and composed.count_parts(found.question) == 2
    assert parse_gold(found.answer) == (20 - 3) * 5
    one, two = found.parts
    assert one == first and two.question == USES.question.replace("12", "20") and two.source == USES.question
    assert parse_gold(two.answer) == 85 and USES.question in found.texts
    # The answer 12 cannot replace the 12: nothing would change. It cannot replace the 3 either: no crane would be left.
    # So it replaces the 5. The answer 2 cannot replace the 12: she cannot give 3 of 2 cranes away. It replaces the 3.
    for gold, expected in ((12, (12 - 3) * 12), (2, (12 - 2) * 5)):
        other = composed.chain(Question("How many?", f"#### {gold}"), USES)
        assert other is not None and parse_gold(other.answer) == expected
    assert composed.chain(Question("How many?", "#### 2.5"), USES) is None


@pytest.mark.parametrize(
    ("question", "answer", "why"),
    [
        ("He and his 5 friends eat 2 figs each. How many?", "6*2 = <<6*2=12>>12\n#### 12", "6 was made of 5 in the head"),
        ("A pen costs 5 cents, a cup 5 cents more. How much is it?", "5+5 = <<5+5=10>>10\n#### 10", "5 stands twice"),
        ("He has 9 coins, a third of 27. How many with one more?", "27/3 = <<27/3=9>>9\n9+1 = <<9+1=10>>10\n#### 10", "9 has two origins"),
        ("A shop gives 20% off a hat of $50 if it costs over $30. The price?", "50*.2 = <<50*.2=10>>10\n50-10 = <<50-10=40>>40\n#### 40", "a threshold"),
        ("He walks 7 miles a day. How far in three weeks?", "3*7*7 = <<3*7*7=147>>147\n#### 147", "7 is the days too"),
        ("Of 10 figs a third go bad. How many?", "10/3 = <<10/3=3>>3\n#### 3", "rounded"),
        ("He has 8 figs and 4 more. How many?", "8 + 4 = 12\n#### 12", "no annotation"),
        ("He has 8 figs and 4 more. How many?", "8 + 4 = <<8+4=12>>12\n12 - 2 = 10\n#### 10", "a step is not annotated"),
        ("He has $9 and saves $4 a week. If he has more than $30, aunt adds $20. In all?", "9+4 = <<9+4=13>>13\n#### 13", "a threshold"),
        ("He walks 6 miles and 8 miles back, the slower way first. How far?", "6+8 = <<6+8=14>>14\n#### 14", "which is slower may change"),
        ("He sleeps from 4 am to 9 am. How long?", "9-4 = <<9-4=5>>5\n#### 5", "times of the day"),
        ("X is 8 and he has 4 more. How many?", "8 + 4 = <<8+4=12>>12\n#### 12", "X is there already"),
        ("He pays $5.50 for 2.5 pounds at 10:30 on the 4th. How much?", "5.50*2.5 = <<5.50*2.5=13.75>>13.75\n#### 13.75", "no whole amounts"),
    ],
)  # fmt: skip
def test_numbers_whose_part_in_the_solution_is_not_certain_are_left_alone(question, answer, why):
    for slot in chained.slots(question, answer):
        assert slot.number == 27 and slot.answer(30) is None, f"{slot.number} although {why}"


def test_numbers_that_are_names_or_follow_from_others_are_left_alone():
    grade = chained.slots("Grade 4 has 7 classes of 9. In all?", "7*9 = <<7*9=63>>63\n4*63 = <<4*63=252>>252\n#### 252")
    rest = chained.slots("Of 20 bags he sold 15, the other 5 for $4 each. How much?", "5*4 = <<5*4=20>>20\n#### 20")
    assert [slot.number for slot in grade] == [7, 9] and [slot.number for slot in rest] == [4]


def test_results_with_another_number_must_make_sense():
    question, answer = (
        "Bo shares 12 figs among 4 and eats 2. How many has he?",
        "12/4 = <<12/4=3>>3\n3-2 = <<3-2=1>>1\n#### 1",
    )
    whole = {slot.number: slot for slot in chained.slots(question, answer)}
    assert parse_gold(whole[12].answer(20) or "") == 3
    assert whole[12].answer(10) is None, "10 / 4 is no whole number where 12 / 4 was one"
    assert whole[12].answer(8) is None and whole[12].answer(4) is None, "nothing, or less, is left"
    assert whole[4].text("X") == "Bo shares 12 figs among X and eats 2. How many has he?"


def kind_of(plan, item: Question) -> str:
    """The kind of a plan, found from its parts."""
    texts = composed.part_texts(item.question)
    if not plan.should_decompose:
        return "direct"
    if all(re.fullmatch(r"What is the answer to \([A-H]\)\?", part) for part in plan.subproblems):
        return "by reference"
    assert set(plan.subproblems) <= set(texts)
    whole = texts[:1] if item.kind == composed.CHAINED else texts
    return "self-contained" if sorted(plan.subproblems) == sorted(whole) else "partial"


@pytest.mark.parametrize("kind", ["sum&parts=2-3", "chained"])
def test_plans_to_imitate_are_of_all_kinds_alike_and_leave_single_problems_whole(kind):
    if kind != "chained":
        items = load_questions(f"multi:generated:shares?people=2&high=20&single=0.4&kind={kind}", limit=900, seed=3)
    else:  # generated problems have no annotations
        first = [Question(f"How many are {n}?", f"#### {n}") for n in range(20, 320)]
        items = [item for one in first if (item := composed.chain(one, USES))]
    found = list(demonstrations(items, seed=1))
    assert found == list(demonstrations(items, seed=1)) and [item for item, _ in found] == items
    composed_ones = [(plan, item) for item, plan in found if item.parts]
    kinds = [kind_of(plan, item) for plan, item in composed_ones]
    assert set(kinds) == set(COMPOSED_KINDS)
    assert all(0.18 < kinds.count(each) / len(kinds) < 0.32 for each in COMPOSED_KINDS), "none is marked"
    orders = [plan.subproblems.index(composed.part_texts(item.question)[0]) for (plan, item), kind in zip(composed_ones, kinds, strict=True) if kind == "self-contained"]  # fmt: skip
    assert set(orders) == {0} if kind == "chained" else 0.2 < orders.count(0) / len(orders) < 0.8
    singles = [plan for item, plan in found if not item.parts]
    assert (
        kind == "chained"
        or abs(sum(not p.should_decompose for p in singles) / len(singles) - SINGLE_DIRECT_SHARE) < 0.08
    )
    assert all(parse_planner_output(plan.to_json()) == plan for _, plan in found)
    long = composed.summed([Question("Long " * 200 + "?", "#### 1"), Question("Short?", "#### 2")])
    assert all(parse_planner_output(plan.to_json()) for _, plan in demonstrations([long] * 20, seed=1))


@needs_gsm8k
@pytest.mark.parametrize("split", ["train", "test"])
def test_real_golds_are_right(split):
    items = load_questions(str(GSM8K), limit=1500, split=split)
    numbered = 0
    for item in items:
        for slot in chained.slots(item.question, item.answer):
            again = slot.answer(slot.number)
            assert again is None or parse_gold(again) == parse_gold(item.answer), item.question
            numbered += again is not None
            changed = slot.answer(10 * slot.number) or "#### 0"
            for left, right in re.findall(r"<<([^=]*)=([^>]*)>>", changed):
                assert abs(eval(left) - float(right)) < 1e-6 * max(1.0, float(right)), changed
    assert numbered > 500
    found = load_questions(f"multi:{GSM8K}?kind=chained&single=0.2&max_steps=3", limit=150, split=split, seed=5)
    assert len(found) == 150
    for item in found:
        if item.parts:
            first, second = item.parts
            shown = item.question.replace("\n", " ")
            assert f"{parse_gold(first.answer):f}" in second.question and " X" in shown.replace("$X", " X")
            assert parse_gold(item.answer) == parse_gold(second.answer) > 0
    known = {part for item in found for part in item.texts[1:]} | {item.question for item in found}
    golds = {item.question: item.answer for item in items}
    summed = load_questions(f"multi:{GSM8K}?parts=2-3&single=0.3&max_steps=3", limit=400, split=split, seed=5)
    assert len(summed) == 400 or (split == "test" and len(summed) > 100)
    for item in summed:
        total = sum((parse_gold(part.answer) for part in item.parts or [item]), Decimal(0))
        assert parse_gold(item.answer) == total
        for part in item.parts:
            assert part.steps <= 3 and golds.get(part.question, part.answer) == part.answer
    assert known


def test_questions_on_which_the_arms_differ_are_stored_for_training(tmp_path, capsys):
    """With single problems, first those that the worker solved alone. All answers are known, so no model runs."""
    source, out, stored = tmp_path / "problems.jsonl", tmp_path / "answers.jsonl", tmp_path / "unlike.jsonl"
    problems = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(12)]
    problems.append({"question": "What is 5 * 2 + 3 - 1?", "answer": "5*2 = 10\n10+3 = 13\n13-1 = 12\n#### 12"})
    source.write_text("".join(json.dumps(item) + "\n" for item in problems))
    command = ["--source", str(source), "--max-steps", "1", "--questions", "3", "--out", str(out), "--batch", "3"]
    command += ["--arms", "direct-composed,by-hand", "--write-unlike", str(stored), "--single", "4"]
    questions = load_questions(f"multi:{source}?parts=2&max_steps=1&kind=sum", limit=3, seed=1)
    settings = benchmark.settings_of(benchmark.build_parser().parse_args(command))
    alone = [[True, False], [True, True], [False, True]]
    for arm, right in (("direct-composed", [True, False, False]), ("by-hand", [True, True, False])):
        for item, correct, parts in zip(questions, right, alone, strict=True):
            record = benchmark._record(item, correct, 20, "", [], parts if arm == "by-hand" else [], None)
            append_jsonl(out, {"arm": arm, **record, **settings})
    assert benchmark.main(command) == 0
    rows = [json.loads(line) for line in stored.read_text().splitlines()]
    assert rows[0] == {"question": questions[1].question, "answer": questions[1].answer}
    single = [row["question"] for row in rows[1:]]
    assert len(single) == 4 and len(set(single)) == 4
    assert single[:2] == [questions[0].texts[1], questions[2].texts[2]], "solved alone, in questions not stored"
    assert not any(part.question in single[2:] for item in questions for part in item.parts)
    assert "What is 5 * 2 + 3 - 1?" not in single, "it has more steps"
    assert "1 composed question on which the arms differ, 4 single problems" in capsys.readouterr().out
    assert [item.question for item in load_questions(str(stored), limit=9)] == [row["question"] for row in rows]
