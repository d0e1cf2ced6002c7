"""Ask a trained planner on a vLLM server: it plans, the server's base model does the work.

A conversation:         python inference_vllm.py
One question:           python inference_vllm.py --question "Ann has 3 pens, Bob has 5. How many do they have?" [--json]
A file of questions:    python inference_vllm.py --input questions.jsonl --output answers.jsonl
A scoreboard:           python inference_vllm.py --benchmark --samples 100 [--dataset SOURCE] [--output FOLDER]

The server:             the command that grpo_training.py prints when it ends; on a CPU: make serve-demo

At start it is checked that the base model answers as itself also while the adapter is busy. Exit codes: 0 done,
1 the server failed (or some questions of a file did), 2 wrong input, 3 the server answers with the wrong model.
Each answer is written to --output FILE as soon as it arrives; after a stop, the same command continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser, add_settings, given_settings, run
from common.errors import UserError
from common.inference.trained_settings import check_given_config
from common.problems.questions import check_source
from common.runs.lock import LOCK_FILE, only_run
from common.settings.inference import ServingArgs

if TYPE_CHECKING:
    from common.inference.batch import Asked
    from common.inference.session import Session


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line. Defaults of settings are those of `ServingArgs`."""
    parser = Parser(prog="inference_vllm.py", description=__doc__)
    what = parser.add_argument_group("what to ask (default: a conversation)")
    what.add_argument("--question", metavar="TEXT", help="one question")
    what.add_argument("--json", action="store_true", help="with --question: the answer as one JSON object on stdout")
    what.add_argument("--input", metavar="FILE", help="JSONL file of objects with question (and perhaps answer, id)")
    what.add_argument("--output", metavar="PATH", help="with --input: JSONL file for answers; with --benchmark: folder")
    what.add_argument("--benchmark", action="store_true", help="compare direct solving, untrained and trained planner")
    what.add_argument("--debug", action="store_true", help="show tracebacks")
    add_settings(parser, ServingArgs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, check everything that is quick to check, connect and ask. Returns the exit code.

    Raises:
        UserError: if a flag, a file or the server does not allow it; with exit code 3 if a wrong model answers.
    """
    options = build_parser().parse_args(argv)
    given = given_settings(options, ServingArgs)
    args = ServingArgs(**given)
    args.validate()
    check_mode(options)
    check_given_config(given, benchmark=options.benchmark)
    if args.dataset is not None:
        check_source(args.dataset, "test")
    output = None if options.output is None else Path(options.output)
    if output is None or not output.absolute().parent.is_dir():
        return start(options, given)
    with only_run(output.with_name(f".{output.name}{LOCK_FILE}"), f"--output {output}"):
        return start(options, given)


def start(options: argparse.Namespace, given: dict[str, Any]) -> int:
    """Check the files, connect and ask. Call it with --output locked against other runs. Returns the exit code."""
    asked: list[Asked] = []
    if options.input is not None:
        from common.inference.batch import already_answered, read_input

        asked = read_input(options.input)
        already_answered(Path(options.output), asked)
    if options.benchmark and options.output is not None:
        from common.inference.benchmark import check_scores_folder

        check_scores_folder(Path(options.output))

    from common.inference.session import Session

    with Session(given) as session:
        temperature = given.get("temperature", 0.0)
        return benchmark_or_ask(session, options, asked, temperature)


def benchmark_or_ask(session: Session, options: argparse.Namespace, asked: list[Asked], temperature: float) -> int:
    """Run the mode that the flags ask for; returns the exit code.

    Args:
        session: connected and checked.
        options: parsed flags.
        asked: the questions of --input.
        temperature: of the plans in --benchmark.

    Raises:
        UserError: if a question asked with --json fails.
    """
    from common.inference import batch, benchmark
    from common.inference.conversation import repl, show_turn

    if options.benchmark:
        return benchmark.benchmark(session, temperature, None if options.output is None else Path(options.output))
    if options.input is not None:
        return batch.answer_file(session, asked, Path(options.output))
    if options.question is None:
        return repl(session)
    if not options.json:
        return 0 if show_turn(session, options.question).result.error is None else 1
    answer = session.run(session.ask(options.question))
    print(json.dumps(answer.record(), ensure_ascii=False))
    if answer.result.error is not None:
        raise UserError(answer.result.error, exit_code=1)
    return 0


def check_mode(options: argparse.Namespace) -> None:
    """Check that the flags can be combined.

    Raises:
        UserError: with the flags that cannot.
    """
    modes = [f"--{name}" for name in ("question", "input", "benchmark") if getattr(options, name) not in (None, False)]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} exclude each other: use one")
    if options.question is not None and not options.question.strip():
        raise UserError("--question is empty: ask something")
    if options.json and options.question is None:
        raise UserError("--json goes with --question: add one (the files of --input are JSON anyway)")
    if options.input is not None and options.output is None:
        raise UserError("--input needs --output: name the file for the answers")
    if options.input is not None and Path(options.input).absolute() == Path(options.output).absolute():
        raise UserError(f"--input and --output are the same file, {options.input}: name another for the answers")
    for name in ("samples", "dataset"):
        if hasattr(options, name) and not options.benchmark:
            raise UserError(f"--{name} goes with --benchmark: add it, or leave --{name} out")
    if options.output is not None and options.input is None and not options.benchmark:
        raise UserError("--output goes with --input or --benchmark: add one of them")


if __name__ == "__main__":
    run(main)
