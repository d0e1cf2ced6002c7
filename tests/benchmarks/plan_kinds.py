"""What each kind of plan is worth to the frozen worker: hand-made plans for generated problems, scored.

    python -m tests.benchmarks.plan_kinds --questions 128

A planner can learn only what its worker rewards, so this table chose the demo's family of problems, its
numbers and its few-shot turns: it says where splitting pays, and by how much, before anything is trained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from common.cli import Parser, count, counted, run
from common.errors import UserError
from common.plans import Plan
from common.problems.generated import amounts_of
from common.problems.questions import check_source, load_questions
from common.settings.grpo import DEMO, TrainingArgs

Amounts = Sequence[int]
Grouping = Callable[[Amounts], list[list[int]]]

PEOPLE = 6
KINDS: dict[str, Grouping] = {
    "direct, steps written out": lambda x: [],
    "pairs, in order": lambda x: [[x[0], x[1]], [x[2], x[3]], [x[4], x[5]]],
    "pairs, backwards": lambda x: [[x[4], x[5]], [x[2], x[3]], [x[0], x[1]]],
    "pairs, outer and inner": lambda x: [[x[0], x[5]], [x[1], x[4]], [x[2], x[3]]],
    "overlapping pairs": lambda x: [[x[0], x[1]], [x[1], x[2]], [x[2], x[3]]],
    "two pairs of three": lambda x: [[x[0], x[1]], [x[2], x[3]]],
    "one pair": lambda x: [[x[0], x[1]]],
    "two threes": lambda x: [list(x[:3]), list(x[3:])],
    "all in one": lambda x: [list(x)],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns the exit code 0.

    Raises:
        UserError: if there is no question, or one that is not of six people.
    """
    parser = Parser(prog="plan_kinds", description=__doc__)
    parser.add_argument("--questions", type=count, default=128, metavar="N", help="questions (default: 128)")
    parser.add_argument("--dataset", default=DEMO["dataset"], help="generated:shares of six people")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the questions (default: 1)")
    options = parser.parse_args(argv)
    check_source(options.dataset)
    questions = load_questions(options.dataset, limit=options.questions, seed=options.seed)
    for item in questions:
        if len(amounts_of(item.question)) != PEOPLE:
            raise UserError(
                f"--dataset {options.dataset}: the plans are made for {PEOPLE} people of generated:shares, found "
                f"{item.question[:80]!r}: use {DEMO['dataset']}"
            )

    from common import models
    from common.evaluation.statistics import wilson_interval
    from common.pipeline import PipelineItem, run_executor
    from common.reports.tables import format_table
    from common.similarity import SentenceEncoder

    args = TrainingArgs(**{**DEMO, "dataset": options.dataset})
    tokenizer = models.load_tokenizer(args.base_model)
    model = models.load_base(args.base_model, four_bit=False).eval()
    executor = run_executor(args, model, tokenizer, SentenceEncoder(args.embedding_model))
    rows = []
    for name, grouping in KINDS.items():
        plans = []
        for item in questions:
            groups = grouping(amounts_of(item.question))
            plans.append(Plan(bool(groups), tuple(f"What is {' + '.join(map(str, group))}?" for group in groups)))
        results = executor.execute_batch(
            [
                PipelineItem(plan.to_json(), item.question, item.answer)
                for plan, item in zip(plans, questions, strict=True)
            ]
        )
        correct = sum(result.correct for result in results)
        low, high = wilson_interval(correct, len(results))
        rows.append(
            {
                f"{counted(len(results), 'question')}, {args.dataset}": name,
                "accuracy": f"{100 * correct / len(results):.0f}%",
                "95% interval": f"{100 * low:.0f}-{100 * high:.0f}",
                "worker tokens": f"{sum(result.worker_tokens or 0 for result in results) / len(results):.0f}",
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    run(main)
