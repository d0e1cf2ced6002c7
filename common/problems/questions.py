"""Questions with gold answers: from the Hub, from files in GSM8K's schema, generated, or composed of several problems.

Files and generator names are checked line by line before anything heavy is imported or downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from common.cli import counted, say
from common.errors import UserError
from common.grading import parse_gold
from common.plans import letters_of
from common.problems import composed, generated
from common.problems.files import SUFFIXES, as_question, data_files, local_path, read_records, split_files
from common.problems.files import Question as Question
from common.processes.ranks import world_size
from common.settings.grpo import TrainingArgs
from common.settings.secrets import first_line, hub_token

# Making and comparing more takes minutes, and a run uses far fewer.
MAX_GENERATED = 100_000


def fingerprint(questions: Iterable[Question]) -> str:
    """Hash of the questions: 16 hexadecimal digits (SHA-256). It changes with any text and with the order."""
    digest = hashlib.sha256()
    for item in questions:
        digest.update(json.dumps([item.question, item.answer]).encode())
    return digest.hexdigest()[:16]


def check_source(dataset: str, split: str = "train", flag: str = "--dataset") -> None:
    """Check a source of questions without network, model or heavy import.

    Files are read and checked completely. Of generated problems only the name is checked, and for `generated:` also the
    options; nothing is generated.

    Args:
        dataset: see `load_questions`.
        split: of a Hub data set or of a folder.
        flag: the flag that sets `dataset`, for error messages.

    Raises:
        UserError: if the source cannot be used.
    """
    if not dataset.strip():
        raise UserError(f"{flag} is empty: name a file, a folder, a Hub id or a generator")
    with naming(flag):
        dataset = composed.inner_source(dataset)
        if dataset.startswith(generated.REASONING_GYM):
            _task_and_options(dataset)
        elif dataset.startswith(generated.PREFIX):
            generated.parse_source(dataset)
        elif is_local(dataset):
            path = local_path(dataset)
            _read_path(path, split if path.is_dir() else "train")
        else:
            hub_token()  # an invalid token is reported now, not later by a library


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Context manager: errors name `flag` in place of `--dataset`, for a source that another flag sets."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--dataset ", f"{flag} "), exit_code=error.exit_code) from error


def load_questions(
    dataset: str,
    *,
    limit: int,
    config: str | None = "main",
    split: str = "train",
    seed: int = 42,
    exclude: Iterable[str] = (),
) -> list[Question]:
    """The first `limit` questions of a source, in the order of the source.

    Args:
        dataset: Hub id, file, folder, `reasoning-gym:TASK?option=value&…`, or `multi:` followed by one of these.
        limit: the largest number of questions to return.
        config: of a Hub data set.
        split: of a Hub data set, or of a folder (see `common.problems.files.split_files`).
        seed: of a generator and of composed questions. Files and the Hub do not use it.
        exclude: texts to leave out, for example those of another split. Both questions and the problems that a
            composed question contains are compared with them.

    Raises:
        UserError: if the source cannot be read; the message says what to try.
    """
    if limit > MAX_GENERATED and is_generated(dataset):
        raise UserError(
            f"--dataset {dataset}: {limit:,} generated questions are too many, at most {MAX_GENERATED:,} are made: "
            "lower --max-samples, or --eval-samples (--samples of inference_vllm.py)"
        )
    left_out = set(exclude)
    if composed.is_composed(dataset):
        recipe = composed.parse_source(dataset)
        made = is_generated(recipe.source)
        problems = (
            _generate(recipe.source, limit * recipe.most, seed, left_out, composed.OPTIONS)
            if made
            else [item for item in _read(recipe.source, config, split) if item.question not in left_out]
        )
        found = composed.compose(problems, recipe, limit, seed, shuffle=not made)
        _tell_kinds(found, dataset, limit)
        return found
    if is_generated(dataset):
        return _generate(dataset, limit, seed, left_out)
    rows = _read(dataset, config, split)
    _tell_repeats(rows, dataset)
    return [item for item in rows if item.question not in left_out][:limit]


def check_enough(args: TrainingArgs, questions: int) -> None:
    """Refuse fewer questions than one step takes. TRL's sampler would yield nothing, and training would end at once.

    Raises:
        UserError: with the number of questions that a step needs.
    """
    needed = args.batch_size * world_size() * args.grad_accum // args.num_generations
    if questions < needed:
        raise UserError(
            f"--dataset {args.dataset} gives {counted(questions, 'question')}, one step takes {needed} (--batch-size × "
            "processes × --grad-accum / --num-generations): lower --grad-accum or --batch-size, or add questions"
        )


def is_generated(dataset: str) -> bool:
    """Whether the questions of a source, or the problems that they are composed of, are generated and not read."""
    return composed.inner_source(dataset).startswith(composed.GENERATORS)


def kind_of_source(dataset: str) -> str:
    """Origin of the questions: "generated", "local" or "hub". A model card names only data sets of the Hub."""
    if is_generated(dataset):
        return "generated"
    return "local" if is_local(composed.inner_source(dataset)) else "hub"


def kinds_of(*sources: str | None) -> set[str]:
    """The kinds of a run's data: "generated", "file", "folder", "hub". A source that cannot be used counts as all."""
    kinds: set[str] = set()
    for source in filter(None, sources):
        try:
            kind, inner = kind_of_source(source), composed.inner_source(source)
            kinds.add(kind if kind != "local" else "folder" if local_path(inner).is_dir() else "file")
        except (UserError, OSError, RuntimeError):  # `check_source` tells what is wrong with it
            kinds |= {"generated", "file", "folder", "hub"}
    return kinds


def family(dataset: str) -> str:
    """What kind of questions a source has, in words: a planner learns one kind and may know nothing of another."""
    if composed.is_composed(dataset):
        return f"composed questions ({composed.parse_source(dataset).kind})"
    return f"{dataset.partition('?')[0]} questions" if is_generated(dataset) else "single word problems"


def tell_other_family(trained_on: str | None, dataset: str) -> None:
    """Say so if an adapter was trained on questions of another kind than those of this run.

    Args:
        trained_on: the adapter's data set; None if unknown.
        dataset: of this run.
    """
    if trained_on is not None and family(trained_on) != family(dataset):
        say(f"note: the adapter was trained on {family(trained_on)}, this run has {family(dataset)}")


def load_held_out(args: TrainingArgs, training: list[Question]) -> list[Question]:
    """Questions for the scoreboard that training does not use.

    Raises:
        UserError: if some of them are also training questions, or if the settings do not name a source for them.
    """
    source = args.eval_dataset or args.dataset
    inner = composed.inner_source(source)
    made, path = is_generated(inner), Path(inner).expanduser()
    if args.eval_dataset is None and not made and is_local(inner) and not path.is_dir():
        raise UserError(
            f"--eval-samples needs held-out questions, and {inner} is one file: name another with --eval-dataset"
        )
    known = [text for item in training for text in item.texts]
    split = args.dataset_split if args.eval_dataset and not made and path.is_file() else "test"
    found = load_questions(
        source,
        limit=args.eval_samples,
        config=args.dataset_config,
        split=split,
        seed=args.seed + 1_000_003,  # so that generated problems differ from those of training
        exclude=known if made else (),
    )
    check_disjoint(known, [text for item in found for text in item.texts])
    apart = f": none of them is among the {counted(len(training), 'training question')}" if training else ""
    fewer = len(found) < args.eval_samples and not composed.is_composed(source)
    less = f"; it has no more ({args.eval_samples} were asked for)" if fewer else ""
    say(f"{counted(len(found), 'held-out question')} from {source}{apart}{less}")
    return found


def check_disjoint(training: Iterable[str], held_out: Iterable[str]) -> None:
    """Check that no question is in both sets. The comparison ignores case, spaces and punctuation.

    Raises:
        UserError: with the number of shared questions, and one example.
    """
    known = {letters_of(text) for text in training}
    shared = [text for text in held_out if letters_of(text) in known]
    if shared:
        raise UserError(
            f"the training set holds {counted(len(shared), 'held-out problem')} too, such as {shared[0][:80]!r}: "
            "name another --eval-dataset"
        )


def is_local(dataset: str) -> bool:
    """Whether a source is a path: it exists, or it looks like one and not like `owner/name`."""
    return (
        dataset.casefold().endswith(SUFFIXES)
        or dataset.startswith((".", "/", "~"))
        or dataset.count("/") > 1
        or Path(dataset).exists()
    )


def _read_path(path: Path, split: str) -> list[Question]:
    if path.is_dir():
        chosen = split_files(path, split)
        if not chosen:
            names = ", ".join(child.name for child in data_files(path)) or "none"
            raise UserError(
                f"--dataset {path} has no file of the split {split!r} (data files found: {names}): "
                "name the file itself, or use --dataset-split"
            )
        return [item for child in chosen for item in _read_path(child, split)]
    rows = [as_question(row, where) for where, row in read_records(path)]
    if not rows:
        raise UserError(f"--dataset {path} holds no question: it is empty")
    return rows


def _read(dataset: str, config: str | None, split: str) -> list[Question]:
    return _read_path(local_path(dataset), split) if is_local(dataset) else _read_hub(dataset, config, split)


def _tell_kinds(questions: list[Question], dataset: str, limit: int) -> None:
    """Print one line with the number of composed questions, and a note if the source gave fewer than `limit`.

    Raises:
        UserError: if there is no question.
    """
    if not questions:
        why = "its source has too few problems that fit the options"
        if composed.parse_source(dataset).kind == composed.CHAINED:
            why += " and whose solutions are annotated as GSM8K's are (<<48/2=24>>)"
        raise UserError(f"--dataset {dataset} gives no question: {why}")
    counts = Counter(max(1, len(item.parts)) for item in questions)
    shares = ", ".join(f"{counts[count]} of {counted(count, 'problem')}" for count in sorted(counts))
    less = f"; its source gives no more ({limit} were asked for)" if len(questions) < limit else ""
    say(f"{dataset}: {counted(len(questions), 'question')}, {shares}{less}")


def _tell_repeats(rows: list[Question], dataset: str) -> None:
    """Print one line if a source contains a question more than once. All copies are kept; the user should know."""
    repeated = len(rows) - len({item.question for item in rows})
    if repeated:
        say(f"{dataset}: {repeated} of {len(rows)} questions occurred before in it; all are kept")


def _read_hub(dataset: str, config: str | None, split: str) -> list[Question]:
    import datasets

    try:
        table = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:
        raise UserError(
            f"data set {dataset!r} could not be loaded from the Hub ({first_line(error)}): check its name and the "
            "network (HF_TOKEN for a gated one), or pass a local file with --dataset FILE.jsonl",
            exit_code=1,
        ) from error
    return [as_question(row, f"{dataset} row {number}") for number, row in enumerate(table, start=1)]


def _task_and_options(dataset: str) -> tuple[str, dict[str, Any]]:
    """`reasoning-gym:chain_sum?max_terms=3` → ("chain_sum", {"max_terms": 3})."""
    task, _, query = dataset.removeprefix(generated.REASONING_GYM).partition("?")
    known = _known_tasks()
    if task not in known:
        close = _usable_tasks_like(task, known) or ["chain_sum", "gsm_symbolic"]
        raise UserError(
            f"--dataset {dataset}: reasoning-gym has no task {task!r}: use one of its {len(known)}, "
            f"such as {', '.join(close)}"
        )
    options: dict[str, Any] = {}
    for name, value in generated.query_options(dataset, query).items():
        try:
            options[name] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        except json.JSONDecodeError:
            options[name] = value
    return task, options


def _usable_tasks_like(task: str, known: list[str]) -> list[str]:
    """At most three tasks of a similar name whose answers are numbers; in most tasks of reasoning-gym they are not."""
    import difflib

    import reasoning_gym

    usable = []
    for name in difflib.get_close_matches(task, known, n=10):
        try:
            for item in reasoning_gym.create_dataset(name, seed=0, size=5):
                parse_gold(f"#### {item['answer']}")
        except (ValueError, AssertionError):  # no number, or a task that needs options
            continue
        usable.append(name)
    return usable[:3]


def _known_tasks() -> list[str]:
    """Names of reasoning-gym's tasks, read from its source files because importing it takes seconds."""
    from importlib.util import find_spec

    spec = find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        raise UserError("generated problems need the package reasoning-gym: pip install -r requirements.txt")
    sources = Path(spec.origin).parent.rglob("*.py")
    pattern = re.compile(r'DATASET_NAME\s*=\s*"(\w+)"|register_dataset\(\s*"(\w+)"')
    return sorted(
        {first or second for path in sources for first, second in pattern.findall(path.read_text(encoding="utf-8"))}
    )


def _generate(dataset: str, limit: int, seed: int, exclude: set[str], outer: Sequence[str] = ()) -> list[Question]:
    """At most `limit` different generated questions that are not in `exclude`.

    Args:
        dataset: the generator.
        limit, seed, exclude: see `load_questions`.
        outer: options of `multi:` that were possible besides the generator's, for error messages.
    """
    draws = 20 * limit + 1000  # stop after this many draws: a task with few different questions repeats them
    since_new, patience = 0, max(limit, 20_000)  # or after so many in a row without a new one
    if limit >= MAX_GENERATED // 10:
        say(f"making {limit:,} questions of {dataset}, which may take a while")
    if dataset.startswith(generated.PREFIX):
        stream: Iterator[tuple[str, str]] = (
            (item.question, item.answer) for item in islice(generated.shares(dataset, seed), draws)
        )
    else:
        stream = _reasoning_gym(dataset, draws, seed, outer)
    found: dict[str, Question] = {}
    for number, (text, answer) in enumerate(stream, start=1):
        since_new += 1
        if text not in exclude and text not in found:
            found[text] = as_question({"question": text, "answer": answer}, f"--dataset {dataset} item {number}")
            since_new = 0
        if len(found) == limit or since_new > patience:
            break
    return list(found.values())


def _reasoning_gym(dataset: str, draws: int, seed: int, outer: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) of a reasoning-gym task."""
    task, options = _task_and_options(dataset)
    import reasoning_gym

    names = [spec.name for spec in fields(reasoning_gym.factory.DATASETS[task][1])]
    unknown = next((name for name in options if name not in names), None)
    if unknown is not None:
        known = ", ".join(name for name in names if name not in ("seed", "size"))  # the run's own
        more = f" (those of {composed.PREFIX} are {', '.join(outer)})" if outer else ""
        raise UserError(f"--dataset {dataset}: {task} has no option {unknown}, its options are {known or 'none'}{more}")
    try:
        source = reasoning_gym.create_dataset(task, **{"seed": seed, **options, "size": draws})
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--dataset {dataset}: {task} refuses these options: {first_line(error)}") from error
    for item in source:
        yield item["question"], f"#### {item['answer']}"
