"""The ground under training on composed questions: how often the frozen worker solves them, whole and split by hand.

    python -m tests.benchmarks.composed --model DIR --source FILE.jsonl --parts 2 --max-steps 2 --questions 100 \\
      --arms direct-single,direct-composed,by-hand,by-reference --out ground.jsonl

The arms, all with the `worked` prompts, greedy:

    direct-single     the whole question, after two solved single problems
    direct-composed   the whole question, after two solved composed ones: the fair baseline
    direct-votes      the majority of --votes answers like those: the greedy one, and samples
    by-hand           split into the problems' own texts, each solved without the question, then combined
    by-reference      split into "What is the answer to (A)?", …, each with the question, then combined

Where by-hand is not well above direct-composed, no planner can learn to split. A planner would also have to write the
plan: the column "with plan" counts the worker's tokens and those of the plan in JSON. With --out each answer is a line
as soon as its batch is done, and the same command goes on where it was stopped. With --server-url an OpenAI-compatible
server answers instead of a local model.

Where all plans for a question are right, or all are wrong, GRPO learns next to nothing from it. --write-unlike stores
the questions that some arm solves and another does not, as data to train on (as the dynamic sampling of DAPO,
arXiv:2503.14476, but once and before training), with --single problems that none of them contains: first those that the
worker solved alone (as parts of by-hand in the other questions), which splitting cannot make more right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import prompts
from common.cli import Parser, count, counted, run, say
from common.errors import UserError
from common.evaluation.fingerprint import digest, worker_prompts
from common.evaluation.scoreboard import VOTE_TEMPERATURE, Answerer, run_direct, run_vote
from common.grading import extract_prediction, parse_gold
from common.pipeline import PipelineExecutor, PipelineItem
from common.plans import Plan
from common.problems.composed import CHAINED, LETTERS, PREFIX, by_reference
from common.problems.questions import MAX_GENERATED, Question, fingerprint, is_generated, load_questions, naming
from common.reports.jsonl import append_jsonl, read_jsonl
from common.reports.tables import format_table
from common.runs.files import write_text_atomically
from common.settings.grpo import PACKAGED_MODEL
from common.workers.base import Worker

STYLE = "worked"
CONTEXTS = ("none", "question")
SINGLE, COMPOSED, VOTES = "direct-single", "direct-composed", "direct-votes"
BY_HAND, BY_REFERENCE = "by-hand", "by-reference"
ARMS = (SINGLE, COMPOSED, VOTES, BY_HAND, BY_REFERENCE)
Record = dict[str, Any]
Arm = Callable[[Sequence[Question]], list[Record]]


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the questions that are not answered yet, and print the table. Returns the exit code 0.

    Raises:
        UserError: for an unknown arm, a source that cannot be used, or an --out file of other settings.
    """
    options = build_parser().parse_args(argv)
    arms = options.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"--arms: there is no arm {unknown[0]!r}: use {', '.join(ARMS)}")
    if options.write_unlike is not None and len(arms) < 2:
        raise UserError("--write-unlike compares arms: name two or more with --arms")
    if options.single and options.write_unlike is None:
        raise UserError("--single adds problems to the file of --write-unlike: name it")
    steps = f"&max_steps={options.max_steps}" if options.max_steps else ""
    kind = f"&kind={options.kind}"
    joint = "&" if "?" in options.source else "?"
    source = f"{PREFIX}{options.source}{joint}parts={options.parts}{steps}{kind}"
    with naming("--source"):
        questions = load_questions(source, limit=options.questions, split=options.split, seed=options.seed)
    settings = settings_of(options)
    records = answered(options.out, questions, settings)
    missing = [arm for arm in arms if any((arm, item.question) not in records for item in questions)]
    if missing:
        solve = load_arms(options)
        for arm in missing:
            left = [item for item in questions if (arm, item.question) not in records]
            for start in range(0, len(left), options.batch):
                for record in solve[arm](left[start : start + options.batch]):
                    records[arm, record["question"]] = record
                    if options.out is not None:
                        append_jsonl(options.out, {"arm": arm, **record, **settings})
                done = len(questions) - len(left) + min(start + options.batch, len(left))
                say(f"{arm}: {done} of {len(questions)}")
    dtype = "on a server" if options.server_url else options.cpu_dtype
    print(f"{source}, {counted(len(questions), 'question')} ({fingerprint(questions)}), {options.model}, {dtype}")
    print(table({arm: [records[arm, item.question] for item in questions] for arm in arms}))
    if options.write_unlike is not None:
        unlike = [item for item in questions if len({records[arm, item.question]["correct"] for arm in arms}) > 1]
        agreed = [item for item in questions if item not in unlike]
        known = solved_parts(agreed, records) if BY_HAND in arms else []
        alone = [*known, *single_problems(options, questions, options.single - len(known))][: options.single]
        write_questions(options.write_unlike, [*unlike, *alone])
        composed, single = counted(len(unlike), "composed question"), counted(len(alone), "single problem")
        print(f"{options.write_unlike}: {composed} on which the arms differ, {single}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser with all flags."""
    parser = Parser(prog="composed", description=__doc__)
    parser.add_argument("--model", default=PACKAGED_MODEL, help="folder, Hub id or packaged model")
    parser.add_argument("--source", required=True, help="problems in GSM8K's schema: file, folder, Hub id, generated:")
    parser.add_argument("--split", default="train", help="of a folder or Hub id (default: train)")
    parser.add_argument("--parts", default="2", help="problems in a question, such as 2 or 2-3")
    parser.add_argument("--kind", default="sum", help="sum or chained")
    parser.add_argument("--max-steps", type=count, help="of a problem's solution, at most")
    parser.add_argument("--questions", type=count, default=100)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--votes", type=count, default=3, help="answers of direct-votes (default: 3)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-tokens", type=count, default=320, help="of one answer")
    parser.add_argument("--batch", type=count, default=20, help="questions answered together")
    parser.add_argument("--cpu-dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--server-url", help="server of the same model, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--server-model", help="name of the base model there, if it has several")
    parser.add_argument("--out", type=Path, help="JSONL file of the answers, to go on from")
    parser.add_argument("--write-unlike", type=Path, help="store the questions on which the arms differ here (JSONL)")
    parser.add_argument(
        "--single", type=count, default=0, metavar="N", help="single problems added to them (default: 0)"
    )
    return parser


def settings_of(options: argparse.Namespace) -> Record:
    """What the answers depend on besides question and arm; stored with each."""
    return {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "cpu_dtype": options.cpu_dtype,
        "server": options.server_url is not None,
        "votes": options.votes,
        "prompts": digest([worker_prompts(STYLE, context) for context in CONTEXTS]),
    }


def solved_parts(questions: Sequence[Question], records: dict[tuple[str, str], Record]) -> list[Question]:
    """The problems of these questions that the worker solved alone, as parts of `by-hand`."""
    return [
        part
        for item in questions
        for part, right in zip(item.parts, records[BY_HAND, item.question]["parts_right"], strict=False)
        if right
    ]


def single_problems(options: argparse.Namespace, questions: Sequence[Question], count: int) -> list[Question]:
    """The first `count` problems of the source that none of the composed questions contains."""
    if count <= 0:
        return []
    used = {part.question for item in questions for part in item.parts}
    # What is read is read anyway; what is generated takes time.
    limit = count if is_generated(options.source) else MAX_GENERATED
    every = load_questions(options.source, limit=limit, split=options.split, exclude=used)
    usable = [item for item in every if options.max_steps is None or item.steps <= options.max_steps]
    return usable[:count]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Store questions with their answers as JSONL in GSM8K's schema."""
    rows = [json.dumps({"question": item.question, "answer": item.answer}, ensure_ascii=False) for item in questions]
    write_text_atomically(path, "".join(f"{row}\n" for row in rows))


def answered(path: Path | None, questions: Sequence[Question], settings: Record) -> dict[tuple[str, str], Record]:
    """The answers of earlier runs to these questions, by arm and question.

    Raises:
        UserError: if the file was made with other settings.
    """
    if path is None or not path.exists():
        return {}
    asked = {item.question for item in questions}
    found = {}
    for record in read_jsonl(path):
        other = [name for name, value in settings.items() if record.get(name) != value]
        if other:
            raise UserError(f"--out {path} was made with another {other[0].replace('_', '-')}: name another file")
        if record["question"] in asked and record["error"] is None:
            found[record["arm"], record["question"]] = record
    return found


def load_arms(options: argparse.Namespace) -> dict[str, Arm]:
    """Functions that answer a batch of questions, one per arm. One worker sees a part alone, the other the question."""
    from common import models

    tokenizer = models.load_tokenizer(options.model)
    (nothing, everything), sampler = _served(options) if options.server_url else _local(options, tokenizer)
    # A plan written by hand is valid even if one of its problems is long.
    alone, shown = (PipelineExecutor(each, None, max_subproblem_chars=10_000) for each in (nothing, everything))

    def single(batch: Sequence[Question]) -> list[Record]:
        asked = [prompts.direct_messages(item.question, STYLE, like_question=False) for item in batch]
        found = []
        for item, answer in zip(batch, alone.worker.generate(asked), strict=True):
            number = extract_prediction(answer.text, finished=answer.finished)
            right = answer.error is None and number == parse_gold(item.answer)
            found.append(_record(item, right, answer.tokens, answer.text, [], [], answer.error))
        return found

    def votes(batch: Sequence[Question]) -> list[Record]:
        row = run_vote(batch, run_direct(batch, alone), sampler, STYLE, options.votes)
        return [
            _record(item, vote["correct"], vote["total_tokens"], vote["answer"], list(vote["votes"]), [], vote["error"])
            for item, vote in zip(batch, row.records, strict=True)
        ]

    def planned(executor: PipelineExecutor, plan: Callable[[Question], Plan]) -> Arm:
        def solve(batch: Sequence[Question]) -> list[Record]:
            written = [plan(item).to_json() for item in batch]
            # One more token for the end of the completion.
            lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in written]
            items = [
                PipelineItem(text, item.question, item.answer, length)
                for text, item, length in zip(written, batch, lengths, strict=True)
            ]
            found = []
            for item, result in zip(batch, executor.execute_batch(items), strict=True):
                solutions = [solution.text for solution in result.solutions]
                parts = [
                    extract_prediction(solution.text, finished=solution.finished) == parse_gold(part.answer)
                    for part, solution in zip(item.parts, result.solutions, strict=False)
                ]
                final = None if result.final is None else result.final.text
                record = _record(item, result.correct, result.worker_tokens, final, solutions, parts, result.error)
                found.append({**record, "plan_tokens": result.item.planner_tokens})
            return found

        return solve

    return {
        SINGLE: single,
        COMPOSED: planned(alone, lambda item: Plan(False, ())),
        VOTES: votes,
        BY_HAND: planned(alone, by_hand),
        BY_REFERENCE: planned(shown, lambda item: Plan(True, tuple(map(by_reference, LETTERS[: len(item.parts)])))),
    }


def _local(options: argparse.Namespace, tokenizer: Any) -> tuple[list[Worker], Answerer]:
    """The workers that see a part alone and with its question, and the model that samples votes, in this process."""
    import torch

    from common import models
    from common.settings.grpo import TrainingArgs
    from common.training.device import quiet_libraries, tune_for_cpu
    from common.workers.local import FrozenWorker, LocalModel

    quiet_libraries(debug=False)
    tune_for_cpu()
    torch.set_grad_enabled(False)
    dtype = models.cpu_dtype(TrainingArgs(cpu_dtype=options.cpu_dtype, use_4bit=False))
    model = models.load_base(options.model, four_bit=False, cpu_dtype=dtype).eval()
    limits = {"max_tokens": options.max_tokens, "cpu_dtype": dtype}
    workers: list[Worker] = [
        FrozenWorker(model, tokenizer, style=STYLE, context=context, **limits) for context in CONTEXTS
    ]
    sampler = LocalModel(model, tokenizer, adapter=False, temperature=VOTE_TEMPERATURE, seed=options.seed, **limits)
    return workers, sampler.generate


def _served(options: argparse.Namespace) -> tuple[list[Worker], Answerer]:
    """The same on a server."""
    from common.servers.client import Endpoint, Server
    from common.servers.model_list import base_model
    from common.workers.remote import ServerWorker

    # A slow server first reads the prompts of a whole batch, and only then answers.
    server = Server(Endpoint(options.server_url, timeout=1800.0, flag="--server-url"))
    served = server.run(server.models())
    name = base_model(served, options.server_model, flag="--server-model", at="--server-url").name
    workers = [
        ServerWorker(server, name, style=STYLE, context=context, max_tokens=options.max_tokens) for context in CONTEXTS
    ]
    return list(workers), workers[0].sampler(VOTE_TEMPERATURE, options.seed).generate


def by_hand(item: Question) -> Plan:
    """The plan that a good planner could write: every problem that needs no other answer, with its full text."""
    parts = item.parts[:1] if item.kind == CHAINED else item.parts
    return Plan(True, tuple(part.question for part in parts))


def _record(
    item: Question, correct: bool, tokens: int | None, final: str | None, solutions: list[str], parts: list[bool],
    error: str | None,
) -> Record:  # fmt: skip
    return {
        "question": item.question,
        "gold": f"{parse_gold(item.answer):f}",
        "correct": correct,
        "tokens": tokens,
        "parts_right": parts,
        "solutions": solutions,
        "final": final,
        "error": error,
    }


def table(records: dict[str, list[Record]]) -> str:
    """A table: accuracy with its interval, tokens, solved parts, and the comparison of each arm with the baseline."""
    from common.evaluation.statistics import mcnemar_exact, wilson_interval

    baseline = COMPOSED if COMPOSED in records else next(iter(records))
    rows = []
    for arm, found in records.items():
        right = [record["correct"] for record in found]
        low, high = wilson_interval(sum(right), len(right))
        parts = [part for record in found for part in record["parts_right"]]
        tokens = [record["tokens"] for record in found if record["error"] is None]
        plans = [record["plan_tokens"] for record in found if record["error"] is None and "plan_tokens" in record]
        mine, theirs, p = mcnemar_exact(right, [record["correct"] for record in records[baseline]])
        rows.append(
            {
                "arm": arm,
                "right": f"{sum(right)} of {len(right)}",
                "accuracy": f"{100 * sum(right) / len(right):.0f}%",
                "95%": f"{100 * low:.0f}-{100 * high:.0f}",
                "tokens": f"{sum(tokens) / max(1, len(tokens)):.0f}",
                "with plan": f"{(sum(tokens) + sum(plans)) / len(tokens):.0f}" if plans else "-",
                "parts right": f"{100 * sum(parts) / len(parts):.0f}%" if parts else "-",
                f"against {baseline}": "-" if arm == baseline else f"{mine} : {theirs}, p = {p:.2g}",
                "failed": str(len(found) - len(tokens)),
            }
        )
    return format_table(rows)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run(main)
