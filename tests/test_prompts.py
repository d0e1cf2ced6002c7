"""What the models are shown."""

from __future__ import annotations

import re

import pytest

from common import prompts
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


def test_templates_without_a_system_role_still_get_the_instructions(smollm2):
    _, tokenizer = smollm2
    assert prompts.accepts_system(tokenizer)
    strict = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    strict.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    assert not prompts.accepts_system(strict)
    text = prompts.render(strict, prompts.fold_system(prompts.planner_messages("How many?", "full")))
    assert "should_decompose" in text and "How many?" in text
