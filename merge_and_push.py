"""Merge a planner's adapter into its base model, prove that the merged model plans the same, and push it to the Hub.

    python merge_and_push.py --base-model meta-llama/Llama-3.1-8B-Instruct --adapter-path ./grpo_planner_adapter \\
        --repo-name user/name
    python merge_and_push.py --adapter-path ./grpo_planner_adapter --repo-name user/name --local-save-path ./merged \\
        --no-push

Writes to --local-save-path: the merged model (safetensors), tokenizer, chat template and generation config,
certification.json (how much the merged model, loaded back from disk, differs from the base model with the adapter) and
README.md (the model card). A merge beyond the tolerance is not pushed: exit code 4. The same command given again
continues an interrupted upload.
"""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from common.cli import Parser, add_settings, given_settings, run, say, settings_table
from common.errors import UserError, UserErrors
from common.fit.missing import check_hub_model
from common.merging import certificate as certifying
from common.merging import hub, model_card
from common.merging.report import certificate_table
from common.merging.unfinished import remove_unfinished_merges
from common.runs import storage
from common.runs.adapters import adapter_origin
from common.runs.files import check_writable, read_json, write_text_atomically
from common.runs.lock import LOCK_FILE, only_run
from common.settings.fields import flag_of
from common.settings.grpo import PACKAGED_MODEL
from common.settings.merge import MergeArgs

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line. Defaults are those of `MergeArgs`."""
    parser = Parser(prog="merge_and_push.py", description=__doc__)
    add_settings(parser, MergeArgs)
    parser.add_argument(
        "--token", metavar="TOKEN", help="Hub token (default: HF_TOKEN or the login, safer as commands are logged)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and library warnings")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, check, merge, certify and push. Returns the exit code.

    Raises:
        UserError: if a check fails.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    given = given_settings(options, MergeArgs)
    if "repo_name" not in given:
        parser.error("--repo-name is required, also with --no-push: the model card names the repo")
    args = MergeArgs(**given)
    args.validate()
    if options.token is not None and not args.push:
        raise UserError("--token is the Hub's, and --no-push needs no Hub: leave one of them out")
    record, base = adapter_origin(args.adapter_path, args.base_model)
    if args.revision is not None and (Path(base).expanduser().exists() or base == PACKAGED_MODEL):
        raise UserError(f"--revision {args.revision}: {base} is no Hub id, so it has no revisions: leave it out")
    inputs = certifying.merge_inputs(
        Path(args.adapter_path),
        base,
        revision=args.revision,
        merge_base=_as_trained(record) if args.merge_base == "auto" else args.merge_base,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
    )
    for source, what in ((args.adapter_path, "the adapter"), (base, "the base model")):
        folder, target = Path(source).expanduser().resolve(), args.target.resolve()
        if folder.is_relative_to(target):
            raise UserError(
                f"--local-save-path {args.target} holds {what}, which would be replaced: name another folder"
            )
        if folder.is_dir() and target.is_relative_to(folder):
            raise UserError(
                f"--local-save-path {args.target} lies in the folder of {what}, which a merge leaves as it is: name "
                "another folder"
            )
    if args.revision is None:
        check_hub_model(base)
    check_writable(args.target, "--local-save-path")
    target = args.target.resolve()
    with only_run(target.with_name(f".{target.name}{LOCK_FILE}"), f"--local-save-path {args.target}"):
        remove_unfinished_merges(target)
        return start(options, args, base, record, inputs)


def start(
    options: argparse.Namespace, args: MergeArgs, base: str, record: dict[str, Any], inputs: dict[str, Any]
) -> int:
    """Merge, certify and push. Call it with the target folder locked. Returns the exit code.

    Args:
        options: parsed flags.
        args: settings of the merge.
        base: Hub id or folder of the base model.
        record: the adapter's training_config.json, or {} without one.
        inputs: as `common.merging.certificate.merge_inputs` returns them.

    Raises:
        UserError: if a check fails; with exit code 4 if the merged model differs too much.
    """
    card = None if args.model_card is None else model_card.read_card(args.model_card)
    evaluation = read_json(Path(args.adapter_path) / "evaluation.json")
    report = certifying.finished_merge(args.target, inputs, overwrite=args.overwrite)
    api, repo_id = None, args.repo_name
    if args.push:
        api = hub.api_for(options.token)
        repo_id = hub.check_push(api, args.repo_name, private=args.private)
    say(settings_table(args, MergeArgs(repo_name="")))

    if report is None:
        # torch, transformers and peft are imported here because that takes seconds
        from common import models
        from common.merging.job import prepare
        from common.merging.merge import merge

        if not options.debug:
            models.quiet_transformers()
        report = merge(prepare(args, base, record, inputs))
    else:
        say(f"{args.target} holds this merge already")
    finished = model_card.build(
        repo_id=repo_id,
        facts=model_card.base_facts(base, args.revision),
        base=base,
        record=record,
        evaluation=evaluation,
        report=report,
        given=card,
    )
    with storage.explained(args.target, lambda: "make room, then the same command goes on from the merged model"):
        write_text_atomically(args.target / "README.md", str(finished))
    tell(args.target, report)
    if not report["certificate"]["passed"]:
        raise UserErrors(report["certificate"]["problems"], exit_code=certifying.EXIT_CODE)
    if api is not None:
        upload(api, args, repo_id)
    return 0


def tell(target: Path, report: dict[str, Any]) -> None:
    """Print the outcome of the merge."""
    found = report["certificate"]
    print(certificate_table(found))
    memory = ", ".join(f"{size / 1e9:.2f} GB ({kind})" for kind, size in report["peak_memory_bytes"].items())
    print(f"\nmodel {report['model_bytes'] / 1e9:.2f} GB, peak memory {memory}, {report['seconds']:.0f} s")
    print(f"{'certified' if found['passed'] else 'NOT certified'}: {target} (figures: {certifying.REPORT})")
    if found["learned_nothing"]:
        say("warning: the adapter changes nothing, so the merged model is the base model")


def upload(api: HfApi, args: MergeArgs, repo_id: str) -> None:
    """Push the merged model. If that fails or is stopped, say how to continue, and raise the error again."""
    say(f"uploading {args.target} to {repo_id}")
    try:
        url = hub.push(api, args.target, repo_id, private=args.private, message="Merged planner")
    except (Exception, KeyboardInterrupt):
        say(f"the merged model is whole in {args.target}; continue the upload with\n  {continue_command(args)}")
        raise
    print(f"pushed: {url}")


def continue_command(args: MergeArgs) -> str:
    """The command line that continues this merge: without --overwrite, which would merge again, and without a token."""
    words = ["python", "merge_and_push.py"]
    for spec in fields(args):
        value = getattr(args, spec.name)
        if spec.name != "overwrite" and value != spec.default:
            words += [flag_of(spec.name)] if value is True else [flag_of(spec.name), str(value)]
    return shlex.join(words)


def _as_trained(record: dict[str, Any]) -> str:
    return "nf4" if record.get("four_bit") else "bf16"


def _stop(received: int, frame: object) -> NoReturn:
    """Turn SIGTERM into an exception, so that temporary folders are removed and the user is told how to continue."""
    raise SystemExit(128 + received)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    run(main)
