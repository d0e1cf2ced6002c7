"""What the models are shown."""

from __future__ import annotations

import re
from datetime import date

import pytest

from common import prompts
from common.errors import UserError
from common.grading import extract_prediction


@pytest.mark.parametrize("style", ["worked", "few-shot"])
def test_the_workers_solved_turns_are_right_and_end_in_the_number_the_grader_reads(style):
    parts, found = ["How many?", "How many more?"], ["1 + 1 = 2", "1 + 2 = 3"]
    requests = [
        prompts.direct_messages("How many are left?", style),
        prompts.subproblem_messages("How many?", "How many are left?", style),
        prompts.combine_messages("How many are left?", parts, found, style),
    ]
    for request in requests:
        assert [turn["role"] for turn in request[1:]] == ["user", "assistant"] * (len(request) // 2 - 1) + ["user"]
        answers = [turn["content"] for turn in request if turn["role"] == "assistant"]
        assert len(answers) >= 2
        for answer in answers:
            steps = re.findall(r"([\d +*/-]*\d) = (\d+)", answer)
            assert steps and all(eval(left) == int(right) for left, right in steps)
            assert extract_prediction(answer) == int(steps[-1][1])


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
    """A tokenizer of its own, whose chat template a test may replace."""
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
    assert prompts.fix_date(tokenizer, date(2025, 2, 3))
    (text,) = prompts.render_all(tokenizer, [prompts.planner_messages("How many?")])
    assert text.startswith(expected)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert prompts.render_all(again, [prompts.planner_messages("How many?")]) == [text]
    assert not prompts.fix_date(again, date(2026, 1, 1)), "nothing is left to fix"


def test_a_template_without_a_date_is_left_alone_and_one_that_cannot_be_fixed_stops_the_run(tokenizer):
    before = tokenizer.chat_template
    assert not prompts.fix_date(tokenizer, date(2025, 2, 3)) and tokenizer.chat_template == before
    tokenizer.chat_template = (
        "{% set form = '%Y' %}{{ strftime_now(form) }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="today's date"):
        prompts.fix_date(tokenizer, date(2025, 2, 3))
