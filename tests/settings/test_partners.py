"""A flag that would change nothing is refused, and the same flag with what it needs is not."""

from __future__ import annotations

from dataclasses import fields

import pytest

import dummy_planner
import grpo_training
from common.cli import given_settings
from common.errors import UserErrors
from common.problems.questions import kinds_of
from common.settings.partners import GRPO_RULES, SFT_RULES, check_partners
from common.settings.sft import SupervisedArgs

SERVED = ["--vllm-url", "http://127.0.0.1:9/v1"]
OWN = ["--vllm-python", "python"]
# The ignored flag, what it needs, what the line must say.
GRPO = [
    (["--vllm-port", "9000"], OWN, "without --vllm-python"),
    (["--vllm-gpu-memory", "0.5"], OWN, "without --vllm-python"),
    (["--vllm-adapter-dir", "versions"], OWN, "without --vllm-url or --vllm-python"),
    (["--vllm-timeout", "9"], SERVED, "without --vllm-url or --vllm-python"),
    (["--vllm-patience", "9"], SERVED, "without --vllm-url or --vllm-python"),
    (["--vllm-max-gap", "1"], SERVED, "without --vllm-url or --vllm-python"),
    (["--worker-timeout", "9"], ["--worker-url", "http://127.0.0.1:9/v1"], "without --worker-url"),
    (["--worker-model", "x"], SERVED, "add its --worker-url"),
    (["--eval-dataset", "generated:shares"], ["--eval-samples", "9"], "without --eval-samples: add that, or leave"),
    (["--dataset-split", "test", "--dataset", "generated:shares"], ["--dataset", "openai/gsm8k"], "no splits"),
    (["--dataset-split", "test", "--dataset", "a.jsonl"], ["--dataset", "multi:x/y?parts=3"], "no splits"),
]
SFT = [
    (["--planner-style", "short"], ["--format", "json-plan"], "without --format json-plan"),
    (["--worker-context", "none"], ["--format", "json-plan"], "without --format json-plan"),
]


@pytest.mark.parametrize(
    ("flags", "partner", "told"), GRPO, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_grpo_refuses_a_flag_without_what_it_is_for(flags, partner, told, tmp_path):
    place = ["--output-dir", str(tmp_path / "run")]
    with pytest.raises(UserErrors) as caught:
        grpo_training.main([*place, *flags])
    assert str(caught.value).startswith(f"{flags[0]} {flags[1]} changes nothing ") and told in str(caught.value)
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()
    options = grpo_training.build_parser().parse_args([*place, *flags, *partner])
    args = grpo_training.settle(options)
    check_partners(args, vars(options), GRPO_RULES, kinds_of(args.dataset, args.eval_dataset))


@pytest.mark.parametrize(
    ("flags", "partner", "told"), SFT, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_sft_refuses_a_flag_without_what_it_is_for(flags, partner, told):
    with pytest.raises(UserErrors, match=f"{flags[0]} {flags[1]} changes nothing .*{told}"):
        dummy_planner.main(flags)
    options = dummy_planner.build_parser().parse_args([*flags, *partner])
    given = given_settings(options, SupervisedArgs)
    args = SupervisedArgs(**{**dummy_planner.DEFAULTS, **given})
    check_partners(args, given, SFT_RULES, kinds_of(args.dataset))


def test_a_folder_has_splits_and_defaults_need_no_partner(tmp_path):
    args = grpo_training.TrainingArgs(dataset=str(tmp_path), dataset_split="test")
    check_partners(args, {"dataset_split": "test"}, GRPO_RULES, kinds_of(args.dataset))
    for unusable in ("multi:", "x" * 999, "~nobody-here/x", "https://a/b"):  # told by another check
        check_partners(args, {"dataset_split": "test"}, GRPO_RULES, kinds_of(unusable))
    supervised = SupervisedArgs(**dummy_planner.DEFAULTS, wandb=False)
    for rules, settings in ((GRPO_RULES, grpo_training.TrainingArgs(wandb=False)), (SFT_RULES, supervised)):
        defaults = {spec.name: spec.default for spec in fields(settings)}
        said = {name: defaults[name] for rule in rules for name in rule.names}  # all of them, with their defaults
        check_partners(settings, said, rules, {"generated"})
