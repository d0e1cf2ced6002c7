"""Sample the plans that the benchmarks run on: what a small planner really writes, stored with its questions.

    python dummy_planner.py --demo --dataset openai/gsm8k --dataset-config socratic --max-seq-len 384 --output-dir warm_start
    python -m tests.benchmarks.sample_plans --adapter-path warm_start

The planner is SmolLM2-135M after a short supervised warm start on GSM8K's sub-questions; the questions come from
reasoning-gym's generator of GSM8K-like problems, so the file can be kept in the repository and holds what GRPO
meets: splits into a few subproblems, direct plans, repeated plans within a group, and output that is no plan.

Writes tests/benchmarks/plans.jsonl: a line a question with its group of completions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import prompts
from common.cli import Parser, count, counted, run
from common.problems.questions import load_questions
from common.runs.adapters import check_adapter_base
from common.settings.grpo import PACKAGED_MODEL

PLANS = Path(__file__).with_name("plans.jsonl")
DATASET = "reasoning-gym:gsm_symbolic"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(prog="sample_plans", description=__doc__)
    parser.add_argument("--adapter-path", required=True, metavar="DIR", help="the warm-started planner")
    parser.add_argument("--questions", type=count, default=20, metavar="N", help="questions (default: 20)")
    parser.add_argument("--group", type=count, default=8, metavar="N", help="completions a question (default: 8)")
    parser.add_argument("--temperature", type=float, default=0.5, metavar="X", help="of sampling (default: 0.5)")
    parser.add_argument("--max-tokens", type=count, default=160, metavar="N", help="longest completion (default: 160)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of questions and samples (default: 1)")
    parser.add_argument("--output", type=Path, default=PLANS, metavar="FILE", help="where the plans go")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Sample the plans and write the file. Returns the exit code."""
    options = build_parser().parse_args(argv)
    check_adapter_base(options.adapter_path, PACKAGED_MODEL)
    questions = load_questions(DATASET, limit=options.questions, seed=options.seed)

    from peft import PeftModel

    from common.models import load_base, load_tokenizer
    from common.reports.jsonl import append_jsonl
    from common.workers.local import LocalModel

    tokenizer = load_tokenizer(PACKAGED_MODEL)
    model = PeftModel.from_pretrained(load_base(PACKAGED_MODEL, four_bit=False), options.adapter_path)
    planner = LocalModel(
        model,
        tokenizer,
        adapter=True,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    asked = [prompts.planner_messages(item.question, "short") for item in questions for _ in range(options.group)]
    answers = iter(planner.generate(asked))
    options.output.unlink(missing_ok=True)
    for item in questions:
        group = [next(answers) for _ in range(options.group)]
        completions = [{"text": a.text, "tokens": a.tokens, "finished": a.finished} for a in group]
        append_jsonl(options.output, {"question": item.question, "answer": item.answer, "completions": completions})
    print(f"{counted(len(asked), 'completion')}: {options.output}")
    return 0


if __name__ == "__main__":
    run(main)
