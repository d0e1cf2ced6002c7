"""The supervised baseline on both of its formats, with a real small model."""

from __future__ import annotations

import json

import pytest
from conftest import run_script

from common.reports.jsonl import read_jsonl


def small(tiny_planner: str, output: str) -> list[str]:
    return [
        "--base-model", tiny_planner, "--output-dir", output, "--no-wandb", "--max-seq-len", "200", "--lr", "0.003",
        "--grad-accum", "1", "--save-steps", "3",
    ]  # fmt: skip


def test_documented_constants_are_the_defaults():
    import dummy_planner

    args = dummy_planner.SupervisedArgs(**dummy_planner.DEFAULTS)
    assert (args.base_model, args.dataset) == (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "emilbiju/Planning-Data-Math-Full-Soln",
    )
    assert (args.output_dir, args.max_seq_len) == ("./deepseek-r1-planner-lora", 17000)
    assert (args.batch_size, args.grad_accum, args.lr, args.num_epochs) == (2, 8, 1e-4, 1.0)


def test_json_plans_then_grpo_from_the_adapter(tiny_planner, tmp_path):
    warm = tmp_path / "warm"
    done = run_script(
        "dummy_planner.py", *small(tiny_planner, str(warm)), "--format", "json-plan", "--dataset", "generated:shares",
        "--max-samples", "50", "--batch-size", "8", "--planner-style", "short",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = read_jsonl(warm / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 7
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert held_out[-1] < held_out[0], "the same questions each time: what was learned must show"
    for name in ("adapter_model.safetensors", "training_config.json", "training_curves.png", "special_tokens_map.json"):
        assert (warm / name).exists(), name
    assert json.loads((warm / "training_config.json").read_text())["rows"] == 49
    again = run_script("dummy_planner.py", *small(tiny_planner, str(warm)))
    assert again.returncode == 2 and "already holds a run" in again.stderr
    resumed = run_script("dummy_planner.py", "--output-dir", str(warm), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in read_jsonl(warm / "metrics.jsonl") if "loss" in line] == list(range(1, 8))


def test_planning_data_in_its_own_columns_with_a_validation_split(tiny_planner, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    row = {
        "SystemPrompt": "Plan.",
        "UserPrompt": "Add 1 and 2.",
        "ExpectedOutput": "<Plan_p><prompt_p.1>1 + 2</prompt_p.1></Plan_p>",
    }
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n")
    done = run_script(
        "dummy_planner.py", *small(tiny_planner, str(tmp_path / "run")), "--dataset", str(folder), "--num-epochs", "2"
    )
    assert done.returncode == 0, done.stderr
    assert "2 rows to imitate, 1 to validate on" in done.stderr
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (validation,) = [record["eval_loss"] for record in logged if "eval_loss" in record]  # a pass costs time: just one
    assert f"{validation:.3f}" in done.stdout


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--format", "json-plan", "--dataset", "./none.jsonl"], 2, "does not exist"),
        (["--lr", "-1"], 2, "--lr must be greater than 0"),
        (["--resume"], 2, "must name the folder of a run"),
    ],
)
def test_wrong_input_is_one_line(flags, code, message, tmp_path):
    done = run_script("dummy_planner.py", "--output-dir", str(tmp_path / "run"), *flags)
    assert done.returncode == code
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
