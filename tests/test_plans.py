"""The plan parser: what it accepts, what it rejects, and that no text makes it raise or slow."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.plans import JsonNumber, Plan, json_objects, near_plan_credit, parse_planner_output

SPLIT = '{"should_decompose": true, "subproblems": ["What is 2+3?", "What is 4*5?"], "plan": "add up"}'
DIRECT = '{"should_decompose": false, "subproblems": [], "plan": "one step"}'
SPLIT_PLAN = Plan(True, ("What is 2+3?", "What is 4*5?"), "add up")
DIRECT_PLAN = Plan(False, (), "one step")


def split(subproblems: object, **more: object) -> str:
    return json.dumps({"should_decompose": True, "subproblems": subproblems, **more})


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        (SPLIT, SPLIT_PLAN),
        (DIRECT, DIRECT_PLAN),
        (f"```json\n{SPLIT}\n```", SPLIT_PLAN),
        (f"Sure! Here is my plan:\n{SPLIT}\nHope that helps.", SPLIT_PLAN),
        (f"{SPLIT}\n{DIRECT}", SPLIT_PLAN),
        (f"{DIRECT}{SPLIT}", DIRECT_PLAN),
        # Objects before the plan that are not plans.
        (f'{{}} {{"a": 1}} {{"should_decompose": "yes"}} {split([])} {SPLIT}', SPLIT_PLAN),
        # Stray braces, brackets, quotes and backslashes in the prose must not hide the plan.
        (f"The set {{1, 2}} and {{ then {SPLIT}", SPLIT_PLAN),
        (f"{{ {SPLIT}", SPLIT_PLAN),
        (f"{{{{{{{SPLIT}}}", SPLIT_PLAN),
        (f"}}]{SPLIT}", SPLIT_PLAN),
        (f"He is 5' 11\" tall. {SPLIT}", SPLIT_PLAN),
        (f'{{ " {SPLIT}', SPLIT_PLAN),
        (f'{{"a": "unclosed {SPLIT}', SPLIT_PLAN),
        (f'{{"a": {SPLIT}', SPLIT_PLAN),
        (f'{{"a": [1, {SPLIT}', SPLIT_PLAN),
        (f"C:\\{SPLIT}", SPLIT_PLAN),
        (f'\\" \\\\" {SPLIT}', SPLIT_PLAN),
        (f'"quoted \\" quote" {SPLIT} "', SPLIT_PLAN),
        # Inside something that is not a plan, valid JSON or not.
        (f'{{"result": {SPLIT}}}', SPLIT_PLAN),
        (f'{{"results": [null, {SPLIT}], "n": 1}}', SPLIT_PLAN),
        (f"{{'result': {SPLIT}, oops}}", SPLIT_PLAN),
        (f'{{"result": {SPLIT},}}', SPLIT_PLAN),
        # The outer object comes first, although the inner one ends before it.
        (f'{{"inner": {SPLIT}, "should_decompose": false}}', Plan(False, (), "")),
        # Inside strings: raw newlines and tabs, braces, escapes.
        (
            '{"should_decompose": true, "subproblems": ["a\nb\tc"], "plan": "x\r\ny"}',
            Plan(True, ("a\nb\tc",), "x\r\ny"),
        ),
        (split(["a } b { c", 'say "hi" \\ é']), Plan(True, ("a } b { c", 'say "hi" \\ é'))),
        ('{"should_decompose": true, "subproblems": ["\\u20ac5 \\ud83d\\ude00"]}', Plan(True, ("€5 😀",))),
        # Optional and unknown keys, spacing, stripping, repeated keys (the last counts).
        ('{"should_decompose": true, "subproblems": ["a"]}', Plan(True, ("a",), "")),
        (split(["a"], plan=None), Plan(True, ("a",), "")),
        (split(["  a ", "\nb\n"]), Plan(True, ("a", "b"))),
        (split(["a"], extra={"x": [1, 2.5e3, None]}), Plan(True, ("a",))),
        ('{"should_decompose":false}', Plan(False, ())),
        ('{"should_decompose": false, "subproblems": ["dropped"]}', Plan(False, ())),
        ('{"should_decompose": false, "should_decompose": true, "subproblems": ["a"]}', Plan(True, ("a",))),
        ('{"should_decompose": true, "subproblems": ["a"], "subproblems": ["b"]}', Plan(True, ("b",))),
        (split(["a"], n=int("9" * 4000)), Plan(True, ("a",))),
        # Characters that no tokenizer accepts do no harm outside the plan.
        (f"\ud800\x00{SPLIT}\udfff", SPLIT_PLAN),
    ],
)
def test_accepts(text: str, plan: Plan) -> None:
    assert parse_planner_output(text) == plan


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I would split this into two parts.",
        "[" + SPLIT[1:],
        SPLIT[:-1],
        SPLIT.replace("true", "True"),
        SPLIT.replace('"', "'"),
        SPLIT.replace("}", ",}"),
        '{"should_decompose": 1, "subproblems": ["a"]}',
        '{"should_decompose": 0}',
        '{"should_decompose": "true", "subproblems": ["a"]}',
        '{"should_decompose": null, "subproblems": ["a"]}',
        '{"subproblems": ["a"], "plan": "no decision"}',
        '{"should_decompose": true, "plan": "nothing to decompose into"}',
        split([]),
        split(None),
        split("a"),
        split({"1": "a"}),
        split([["a"]]),
        split(["a", 5]),
        split(["a", None]),
        split(["a", {"text": "b"}]),
        split(["a", ""]),
        split(["a", " \n\t "]),
        split(["a"] * 9),
        split(["a" * 501]),
        split(["a"], plan=5),
        split(["a"], plan=["b"]),
        split(["a"], plan=False),
        '{"should_decompose": false, "subproblems": null}',
        '{"should_decompose": false, "subproblems": "none"}',
        '{"should_decompose": false, "subproblems": [1]}',
        '{"should_decompose": true, "should_decompose": "x", "subproblems": ["a"]}',
        '{"should_decompose": true, "subproblems": ["bad \\q escape"]}',
        # Half a surrogate pair would make the tokenizer raise later, in the worker.
        '{"should_decompose": true, "subproblems": ["\\ud800"]}',
        '{"should_decompose": true, "subproblems": ["\ud800"]}',
        split(["a"], plan="\udfff"),
        # A plan inside a JSON string is not the planner's plan.
        json.dumps({"note": SPLIT}),
    ],
)
def test_rejects(text: str) -> None:
    assert parse_planner_output(text) is None


DRAFT = '{"should_decompose": false, "subproblems": []}'
AB_PLAN = Plan(True, ("a?", "b?"), "")
AB = AB_PLAN.to_json()


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        (f"<think>Maybe {DRAFT} first</think>\n{AB}", AB_PLAN),
        ('<think>{"should_decompose": true, "subproblems": ["a?"], "plan": ""}', None),
        # Some templates put the opening tag into the prompt.
        (f"Maybe {DRAFT} first</think>\n{AB}", AB_PLAN),
        (f"<think>{DRAFT}</think> {DRAFT} <think>no</think> {AB}", AB_PLAN),
        (f"<think>{AB}</think>", None),
        (f"<think></think>{AB}", AB_PLAN),
        (f"<thinking>Maybe {DRAFT} first</thinking>\n{AB}", AB_PLAN),
        (f"[THINK]{DRAFT}[/THINK]{AB}", AB_PLAN),
        (f"<thinking>{AB}", None),
        (f"<think>{DRAFT}</think>So: <think>{AB}", None),
        (f"{AB}<think>{DRAFT}", AB_PLAN),
        (f"</think>{AB}", AB_PLAN),
        # A draft that the end of the reasoning cuts in two is no plan.
        (f"<think>{AB[:30]}</think>{AB[30:]}", None),
    ],
)
def test_plan_is_what_comes_behind_the_reasoning(text: str, plan: Plan | None) -> None:
    assert parse_planner_output(text) == plan
    assert (near_plan_credit(text) == 1.0) == (plan is not None)


def test_draft_in_the_reasoning_earns_no_credit() -> None:
    assert near_plan_credit(f"<think>{AB}") == 0.0
    assert near_plan_credit(f"<think>{AB}</think> I split it.") == 0.0
    assert near_plan_credit(f"<think>{AB}</think>{{}}") == near_plan_credit("{}")


def test_caps_are_the_callers_and_count_after_stripping() -> None:
    assert parse_planner_output(split(["a"] * 8)) is not None
    assert parse_planner_output(split([" " + "a" * 500 + " "])) is not None
    assert parse_planner_output(split(["a", "b"]), max_subproblems=1) is None
    assert parse_planner_output(split(["a"] * 20), max_subproblems=20) is not None
    assert parse_planner_output(split(["abc"]), max_subproblem_chars=2) is None


def test_truncated_completion_is_invalid_even_if_its_plan_looks_complete() -> None:
    assert parse_planner_output(SPLIT + " and then", finished=False) is None


def test_plan_is_hashable_so_that_distinct_plans_can_be_counted() -> None:
    assert len({parse_planner_output(SPLIT), parse_planner_output(f"x {SPLIT}"), DIRECT_PLAN}) == 2


def test_to_json_is_compact_in_order_and_readable() -> None:
    plan = Plan(True, ("How many € is 5 + 5?",), 'then "combine"')
    written = plan.to_json()
    assert written == ('{"should_decompose":true,"subproblems":["How many € is 5 + 5?"],"plan":"then \\"combine\\""}')


# --- any text ------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(), max_size=200)  # with NULs and lone surrogates
FRAGMENTS = ["{", "}", "[", "]", ":", ",", '"', "\\", '\\"', '"a"', "1", "-", ".5", "e9", "true", " ", "\n", "x"]
PIECES = [*FRAGMENTS, '{"a":', '"}', '"{', "{}", "\\u12", "NaN", "01"]
JSON_SOUP = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
REASONED_SOUP = st.lists(st.sampled_from([*PIECES, AB, "<think>", "</think>"]), max_size=40).map("".join)
PROSE = st.text(st.characters(exclude_characters="{}"), max_size=60)
SENTENCE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).map(str.strip).filter(bool)
PLANS = st.one_of(
    st.builds(Plan, st.just(False), st.just(()), st.text(st.characters(exclude_categories=["Cs"]))),
    st.builds(
        Plan,
        st.just(True),
        st.lists(SENTENCE, min_size=1, max_size=8).map(tuple),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
)


@settings(deadline=None)  # a slow machine must not fail the test
@given(st.one_of(ANY_TEXT, JSON_SOUP, REASONED_SOUP))
def test_never_raises(text: str) -> None:
    plan = parse_planner_output(text)
    credit = near_plan_credit(text)
    assert (credit == 1.0) == (plan is not None)
    assert 0.0 <= credit <= 1.0


@settings(deadline=None)  # a slow machine must not fail the test
@given(before=PROSE, plan=PLANS, after=ANY_TEXT)
def test_written_plan_in_prose_parses_back(before: str, plan: Plan, after: str) -> None:
    assert parse_planner_output(before + plan.to_json() + after) == plan


@settings(deadline=None)  # a slow machine must not fail the test
@given(plan=PLANS, before=st.lists(st.sampled_from(["{", "[", '{"a":', '{"a":[', '"', "\\", "x", ","])).map("".join))
def test_debris_before_a_plan_does_not_hide_it(plan: Plan, before: str) -> None:
    assert parse_planner_output(before + plan.to_json()) == plan


@settings(deadline=None, max_examples=500)
@given(JSON_SOUP)
def test_finds_what_the_json_module_finds_from_every_brace(text: str) -> None:
    decoder = json.JSONDecoder(strict=False, parse_int=JsonNumber, parse_float=JsonNumber, parse_constant=JsonNumber)
    expected = []
    for start in range(len(text)):
        if text[start] == "{":
            try:
                expected.append(decoder.raw_decode(text, start)[0])
            except ValueError:
                continue
    assert json_objects(text) == expected


# --- very long texts -----------------------------------------------------------------------------------------

MEGABYTE = 1_000_000
PATTERNS = [
    "{", "}", "[", '"', "\\", "1", "-", " ", "\n", "x", "\ud800", '\\"', '"{', '{"', "{}", "{ ",
    '{"a":', '{"a":[', '[{"a":', '{"a":1,', '{"a":{},', '{"a":"\\', '{"should_decompose":',
    '{"should_decompose":true,"subproblems":["a"],"x":', '{"should_decompose":1,"subproblems":[', '"\\u', "1e", '{"\\"',
    "<think>", "</think>", "<think></think>", "<think>{", "</think>{", "<",
]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", '{"plan": "', '{"subproblems": ['], ids=["plain", "in a string", "in a list"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_pattern_takes_more_than_linear_time(pattern: str, prefix: str) -> None:
    text = prefix + pattern * (200_000 // len(pattern))
    begin = time.process_time()
    parse_planner_output(text)
    # About 0.3 s at worst; a quadratic regex or scan would take a quarter of a minute or more.
    assert time.process_time() - begin < 4


@pytest.mark.parametrize("pattern", ["{", "[", '"', "\\", "{}", '{"a":', '{"a":[', '{"a":"\\', '{"\\"'])
def test_a_megabyte_takes_seconds(pattern: str) -> None:
    text = '{"subproblems": [' + pattern * (MEGABYTE // len(pattern))
    begin = time.process_time()
    parse_planner_output(text)
    assert time.process_time() - begin < 10


def test_plan_after_a_megabyte_of_braces_is_found() -> None:
    assert parse_planner_output("{" * MEGABYTE + SPLIT) == SPLIT_PLAN
    assert parse_planner_output('{"a":' * 200_000 + SPLIT) == SPLIT_PLAN


def test_depth_is_no_limit() -> None:
    depth = 100_000
    nested = "[" * depth + "]" * depth
    assert parse_planner_output(f'{{"deep": {nested}, {DIRECT[1:]}') == DIRECT_PLAN
    # Every level is a valid object with an invalid plan. Checking one must not include the levels inside it.
    text = '{"should_decompose": 1, "a": ' * depth + SPLIT + "}" * depth
    assert parse_planner_output(text) == SPLIT_PLAN


def test_huge_number_is_not_converted() -> None:
    digits = "9" * MEGABYTE
    begin = time.process_time()
    assert parse_planner_output(f'{{"n": {digits}, "should_decompose": false}}') == Plan(False, ())
    assert parse_planner_output(f'{{"should_decompose": {digits}}}') is None
    assert time.process_time() - begin < 5


# --- format credit -------------------------------------------------------------------------------------------


def test_credit_grows_towards_a_plan_and_only_a_plan_earns_all_of_it() -> None:
    steps = [
        "I would split it.",
        "{",
        "{}",
        '{"should_decompose" "subproblems"}',
        '{"should_decompose" "subproblems" "plan"}',
        SPLIT.replace("true", "1"),
        SPLIT,
    ]
    credits = [near_plan_credit(step) for step in steps]
    assert credits == sorted(set(credits))
    assert credits[0] == 0.0
    assert credits[-2] < 1.0
    assert credits[-1] == 1.0


def test_credit_knows_the_callers_limits_and_truncation() -> None:
    assert near_plan_credit(split(["a", "b"], plan=""), max_subproblems=1) < 1.0
    assert near_plan_credit(SPLIT, finished=False) < 1.0


def test_naming_the_keys_in_prose_earns_nothing() -> None:
    assert near_plan_credit('"should_decompose" "subproblems" "plan" }') == 0.0
