"""README and docs: quick commands run, the library example runs, and every file they name exists."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SCRIPTS = ("grpo_training.py", "dummy_planner.py", "inference_vllm.py", "merge_and_push.py")
# Files that a run creates, or that are outside the project: the pages name them, the repository lacks them.
MADE = re.compile(
    r"demo_adapter|training_config\.json|metrics\.jsonl|samples\.jsonl|evaluation\.|certification\.json|adapter_|README\.md"
    r"|training_curves\.png|\.\./|questions\.jsonl|answers\.jsonl|planning\.jsonl|train\.jsonl|train_socratic|tokenizer|_step\.md|chat_template"
)


def test_a_newcomer_can_finish_it():
    lines = README.splitlines()
    assert len(lines) <= 180
    too_long = [line for line in lines if len(line) > 100]
    assert not too_long, too_long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
    for name in re.findall(r"`([\w./-]+\.(?:py|md|txt|jsonl|png|toml))`", text):
        places = (ROOT / name, ROOT / "common" / name, page.parent / name)
        assert MADE.search(name) or any(place.exists() for place in places), f"{page.name} names {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_flags_that_the_pages_use(script):
    shown = run_script(script, "--help")
    assert shown.returncode == 0 and shown.stderr == ""
    commands = [
        line
        for page in PAGES
        for line in page.read_text().replace("\\\n", " ").splitlines()
        if f"python {script}" in line
    ]
    assert commands, f"no page shows {script}"
    for command in commands:
        for flag in re.findall(r"(?<=\s)--[a-z0-9-]+", command.split("#")[0]):
            assert flag in shown.stdout, f"{script} has no {flag}, which a page uses: {command.strip()}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_input_is_one_line_and_exit_code_2(script):
    done = run_script(script, "--no-such-flag")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "--no-such-flag" in done.stderr


def test_the_example_of_use_as_a_library_runs():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    done = subprocess.run(
        [sys.executable, "-c", example[1]], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    answer, reward = done.stdout.split()
    assert answer == "19" and float(reward) > 1, "three subproblems that cover the question are solved and combined"
