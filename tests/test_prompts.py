"""The prompts that the models read."""

from __future__ import annotations

import re
from datetime import date

import pytest

from common import prompts
from common.errors import UserError
from common.grading import extract_prediction
from common.models.chat_date import fix_date
from common.problems.composed import by_reference, chained_text, count_parts, part_texts, sum_text

SUMS = [sum_text([f"How many is {n}?" for n in range(count)]) for count in (2, 3, 4, 6)]
CHAINED = chained_text("How many is 4?", "How many is X + 1?")


@pytest.mark.parametrize("question", ["How many are left?", *SUMS, CHAINED])
@pytest.mark.parametrize("style", ["worked", "few-shot"])
def test_the_workers_solved_turns_are_right_and_end_in_the_number_the_grader_reads(style, question):
    parts, found = ["How many?", "How many more?"], ["1 + 1 = 2", "1 + 2 = 3"]
    requests = [
        prompts.direct_messages(question, style),
        prompts.subproblem_messages("How many?", question, style),
        prompts.combine_messages(question, parts, found, style),
    ]
    for request in requests:
        assert [turn["role"] for turn in request[1:]] == ["user", "assistant"] * (len(request) // 2 - 1) + ["user"]
        answers = [turn["content"] for turn in request if turn["role"] == "assistant"]
        assert len(answers) >= 2
        for answer in answers:
            steps = re.findall(r"([\d +*/-]*\d) = (\d+)", answer)
            assert steps and all(eval(left) == int(right) for left, right in steps)
            assert extract_prediction(answer) == int(steps[-1][1])


@pytest.mark.parametrize("question", [*SUMS, CHAINED])
def test_composed_questions_are_preceded_by_solved_ones_of_their_kind(question):
    count = min(4, count_parts(question))
    direct = prompts.direct_messages(question, "worked")
    for turn in direct[1:-1:2]:
        assert count_parts(turn["content"]) == count
        assert ("X in (B)" in turn["content"]) == (question == CHAINED)
    for letter in "ABCD"[:count]:
        assert all(f"Answer to ({letter}): " in turn["content"] for turn in direct[2:-1:2]), "solved part by part"
    single = prompts.direct_messages("How many are left?", "worked")
    assert prompts.direct_messages(question, "worked", like_question=False)[:-1] == single[:-1] != direct[:-1]
    named = prompts.subproblem_messages(by_reference("A"), question, "worked")[1]
    assert (
        "What is the answer to (A)?" in named["content"] and count_parts(named["content"].split("only:\n")[1]) == count
    )
    for texts in (part_texts(turn["content"]) for turn in direct[1:-1:2]):
        assert not any(text in question for text in texts), "an example is never the question"


@pytest.mark.parametrize("style", ["instruct", "worked", "few-shot"])
def test_without_context_a_part_is_all_that_its_prompt_shows_of_the_question(style):
    question, part = "Zoe has 31 owls and 47 elks. How many animals?", "What is 31 + 47?"
    alone = prompts.subproblem_messages(part, question, style, "none")
    assert "owls" not in str(alone) and alone == prompts.subproblem_messages(part, "another", style, "none")
    assert alone[-1]["content"].startswith(part)
    shown = prompts.subproblem_messages(part, question, style)
    assert ("owls" in shown[-1]["content"]) == (style != "few-shot")
    assert prompts.subproblem_messages(SUMS[0], SUMS[0], "worked", "none") == prompts.direct_messages(SUMS[0], "worked")


def test_the_planner_is_told_what_the_worker_sees():
    for style, told in (("full", "understood alone"), ("short", "understood without the rest")):
        usual, alone = (prompts.planner_messages("Q", style, context) for context in ("question", "none"))
        assert usual == prompts.planner_messages("Q", style) != alone
        assert told in alone[0]["content"] and told not in usual[0]["content"]
        assert "{" not in alone[0]["content"] + usual[0]["content"]


def test_a_plans_text_is_shown_only_where_there_is_one():
    for style in ("instruct", "worked"):
        assert prompts.direct_messages("Q", style, " \n") == prompts.direct_messages("Q", style)
        for messages in (
            prompts.direct_messages("Q", style, "First the pens."),
            prompts.combine_messages("Q", ["a"], ["1"], style, "First the pens."),
        ):
            assert [("First the pens." in message["content"]) for message in messages].count(True) == 1
            assert "First the pens." in messages[-1]["content"]


TEMPLATES = {
    "refuses it": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    ),
    "drops it": (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<a>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    ),
    "wants turns to alternate": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    ),
}


@pytest.fixture
def tokenizer(smollm2):
    """A separate tokenizer, so that a test may replace its chat template."""
    return type(smollm2[1]).from_pretrained(smollm2[1].name_or_path)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_without_a_system_role_still_get_the_instructions(kind, tokenizer):
    assert prompts.accepts_system(tokenizer)
    tokenizer.chat_template = TEMPLATES[kind]
    assert not prompts.accepts_system(tokenizer)
    asked = [
        *prompts.sample_requests("full", "worked"),
        *prompts.sample_requests("short", "few-shot"),
        *prompts.sample_requests("short", "instruct"),
    ]
    prompts.check_shown(tokenizer, asked)
    for messages, text in zip(asked, prompts.render_all(tokenizer, asked), strict=True):
        assert all(message["content"].strip() in text for message in messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves the system",
        ),
        ("{{ messages[-1].content }}", "leaves the system's text out"),  # few-shot turns are dropped
        ("{{ raise_exception('only tools here') }}", r"refuses the prompts.*\(only tools here\)"),
    ],
)
def test_a_template_that_does_not_show_a_prompt_stops_the_run_in_one_line(template, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as caught:
        prompts.check_shown(tokenizer, prompts.sample_requests("full", "few-shot"))
    assert "\n" not in str(caught.value) and "--base-model" in str(caught.value)


DATED = {
    "Llama": (
        '{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b'
        ' %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}Today Date: {{ date_string }}'
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "Today Date: 03 Feb 2025",
    ),
    "Granite": (
        "{{ strftime_now( '%B %d, %Y' ) }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "February 03, 2025",
    ),
}


@pytest.mark.parametrize("family", DATED)
def test_a_date_in_the_template_is_the_runs_on_every_day_and_is_saved_with_it(family, tokenizer, tmp_path):
    template, expected = DATED[family]
    tokenizer.chat_template = template
    (before,) = prompts.render_all(tokenizer, [prompts.planner_messages("How many?")])
    assert expected not in before
    assert fix_date(tokenizer, date(2025, 2, 3))
    (text,) = prompts.render_all(tokenizer, [prompts.planner_messages("How many?")])
    assert text.startswith(expected)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert prompts.render_all(again, [prompts.planner_messages("How many?")]) == [text]
    assert not fix_date(again, date(2026, 1, 1)), "nothing is left to fix"


def test_a_template_without_a_date_is_left_alone_and_one_that_cannot_be_fixed_stops_the_run(tokenizer):
    before = tokenizer.chat_template
    assert not fix_date(tokenizer, date(2025, 2, 3)) and tokenizer.chat_template == before
    tokenizer.chat_template = (
        "{% set form = '%Y' %}{{ strftime_now(form) }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="today's date"):
        fix_date(tokenizer, date(2025, 2, 3))


def test_combining_a_composed_question_shows_the_answers_of_its_parts_and_no_other_number():
    question = sum_text(["Ann has 2 pens. How many?", "Bob has 3 pens. How many?"])
    solutions = ['17 - 15 = 2\n{"final_answer": 2}', "I do not know."]
    asked = prompts.combine_messages(question, ["What has Ann?", "What has Bob?"], solutions, "worked")[-1]["content"]
    assert question in asked and "part 1: 2\n" in asked and "17" not in asked
    assert "part 2: I do not know." in asked, "without an answer the whole solution is shown"
