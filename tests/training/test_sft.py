"""The supervised baseline on both of its formats, with a real small model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from datetime import date
from pathlib import Path

import pytest
import torch
from conftest import flags, run_script, start_script

from common.reports.jsonl import read_jsonl
from common.settings.sft import SupervisedArgs
from dummy_planner import DEFAULTS


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
    done = start_script(
        "dummy_planner.py", *small(tiny_planner, str(warm)), "--format", "json-plan", "--dataset", "generated:shares",
        "--max-samples", "50", "--batch-size", "8", "--planner-style", "short", "--lora-r", "4", "--lora-layers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, _, told = done.stdout.partition("go on with GRPO:\n  ")
    assert f"grpo_training.py --base-model {tiny_planner} --planner-style short --dataset generated:shares" in told
    goes_on = run_script(
        "grpo_training.py", *shlex.split(told.splitlines()[0])[2:], "--output-dir", str(tmp_path / "grpo"), "--no-wandb",
        "--max-steps", "1", "--max-samples", "8", "--max-completion-length", "16", "--worker-max-tokens", "8",
    )  # fmt: skip
    assert goes_on.returncode == 0, goes_on.stderr
    settings = json.loads((tmp_path / "grpo" / "training_config.json").read_text())["settings"]
    assert (settings["lora_r"], settings["lora_alpha"], settings["lora_layers"]) == (4, 32, 1), (
        "what it was trained with"
    )
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
    assert (
        f"has all of its steps, so nothing is trained: go on from it in another --output-dir with --adapter-path {warm}"
        in (resumed.stderr)
    )
    assert [line["step"] for line in read_jsonl(warm / "metrics.jsonl") if "loss" in line] == list(range(1, 8))


def test_the_next_command_names_what_the_warm_start_was_told():
    from common.settings.sft import SFT_DEMO, SupervisedArgs
    from common.training.sft import grpo_flags
    from dummy_planner import DEFAULTS

    def flags(**changes: object) -> str:
        return " ".join(grpo_flags(SupervisedArgs(**{**DEFAULTS, **changes})))

    assert flags(**SFT_DEMO) == "--demo --adapter-path ./demo_warm_start"
    composed = flags(**{**SFT_DEMO, "dataset": "multi:x?parts=3", "worker_context": "none", "planner_style": "full"})
    assert "--demo" not in composed
    assert "--worker-context none --dataset multi:x?parts=3 --adapter-path" in composed
    assert "--dataset" not in flags(format="planning-data", dataset="x")  # holds no questions


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
    (validation,) = [record["eval_loss"] for record in logged if "eval_loss" in record]  # evaluated once only
    assert f"{validation:.3f}" in done.stdout


# A short form of a reasoning model's template: begins the reasoning in the prompt, removes it from answers.
REASONING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


@pytest.mark.parametrize(("style", "rows"), [("full", 5), ("short", 1), ("full", 1)])
def test_what_prompts_begin_with_is_run_once_with_the_loss_gradient_and_metrics_of_trl(
    tiny_planner, tmp_path, style, rows
):
    """The prompts have system messages of different length; a batch of one has nothing to share."""
    from trl.trainer.sft_trainer import SFTTrainer

    from common import models
    from common.problems.demonstrations import load_demonstrations
    from common.training.sft import ImitationTrainer, build_trainer, load_rows, tokenised

    given = {
        "base_model": tiny_planner, "format": "json-plan", "dataset": "generated:shares", "planner_style": style,
        "max_samples": 40, "lora_layers": 1, "batch_size": rows, "output_dir": str(tmp_path), "cpu_dtype": "float32",
    }  # fmt: skip
    args = SupervisedArgs(**{**DEFAULTS, **given})
    tokenizer = models.load_tokenizer(tiny_planner)
    base = models.load_base(tiny_planner, four_bit=False)
    demonstrations, _ = load_rows(args, load_demonstrations(args))
    rows_of = tokenised(tokenizer, demonstrations, frozenset([tokenizer.eos_token_id]))
    trainer = build_trainer(args, base, tokenizer, rows_of, rows_of)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)  # at 0 no gradient reaches lora_A
    batch = next(iter(trainer.get_train_dataloader()))
    read: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *call: read.append(call[1][0].numel()))

    def scored(method):
        model.zero_grad()
        read.clear()
        trainer._metrics["train"].clear()
        loss = method(trainer, model, dict(batch), num_items_in_batch=torch.tensor(70))
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return (
            loss.detach(),
            {name: value[-1] for name, value in trainer._metrics["train"].items()},
            gradient,
            sum(read),
        )

    loss, metrics, gradient, all_tokens = scored(SFTTrainer.compute_loss)
    our_loss, our_metrics, our_gradient, our_tokens = scored(ImitationTrainer.compute_loss)
    handle.remove()
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    for name in ("entropy", "mean_token_accuracy"):
        assert our_metrics[name] == pytest.approx(metrics[name], rel=1e-4)
    for name, part in gradient.items():
        torch.testing.assert_close(our_gradient[name], part, rtol=1e-3, atol=1e-4 * float(part.abs().max()), msg=name)
    assert any(float(part.abs().max()) > 0 for name, part in gradient.items() if "lora_A" in name)
    assert our_tokens == all_tokens if rows == 1 else our_tokens < 0.6 * all_tokens


@pytest.mark.parametrize("template", [None, REASONING_TEMPLATE], ids=["instruct", "reasoning"])
def test_labels_are_the_whole_output_and_the_end_after_the_prompt_of_grpo(template, tiny_planner, tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from common import models
    from common.training.sft import Demonstration, sft_config, tokenised
    from common.workers.local import end_token_ids

    tokenizer = models.load_tokenizer(tiny_planner)
    tokenizer.chat_template = template or tokenizer.chat_template
    base = models.load_base(tiny_planner, four_bit=False)
    messages = [{"role": "system", "content": "Plan."}, {"role": "user", "content": "Add 1 and 2."}]
    outputs = [
        "<think>\nTwo numbers.\n</think>\n\n<Plan_p>1 + 2</Plan_p>",
        '{"should_decompose": false}',
        "  padded \n",
    ]
    rows = [Demonstration(messages, text) for text in outputs]
    args = SupervisedArgs(**{**DEFAULTS, "base_model": tiny_planner, "output_dir": str(tmp_path)})
    data = tokenised(tokenizer, rows, end_token_ids(base, tokenizer))
    trainer = SFTTrainer(
        model=base,
        args=sft_config(args, base.config),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    assert isinstance(trainer.train_dataset, Dataset)
    # As GRPO's trainer gives a conversation to the model.
    prompt = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    for row, text in zip(trainer.train_dataset, outputs, strict=True):
        learned = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(learned) == text + tokenizer.eos_token
        assert row["input_ids"] == prompt["input_ids"] + learned


def test_a_dated_template_is_recorded_and_a_run_from_the_adapter_takes_the_date_over(tiny_planner, tiny_args, tmp_path):
    base = tmp_path / "dated"
    shutil.copytree(tiny_planner, base)
    template = base / "chat_template.jinja"
    template.write_text('Today is {{ strftime_now("%d %b %Y") }}.\n' + template.read_text())
    warm = tmp_path / "warm"
    done = run_script(
        "dummy_planner.py", *small(str(base), str(warm)), "--format", "json-plan", "--dataset", "generated:shares",
        "--max-samples", "9", "--batch-size", "8", "--planner-style", "short",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((warm / "training_config.json").read_text())
    assert record["prompt_date"] == date.today().isoformat()
    assert record["frozen_worker"]["worker_equals_base"] is True and record["data_source"] == "generated"
    (warm / "training_config.json").write_text(json.dumps({**record, "prompt_date": "2025-02-03"}))
    tiny_args.base_model, tiny_args.adapter_path, tiny_args.max_steps = str(base), str(warm), 1
    done = run_script("grpo_training.py", *flags(tiny_args))
    assert done.returncode == 0, done.stderr
    run = Path(tiny_args.output_dir)
    assert json.loads((run / "training_config.json").read_text())["prompt_date"] == "2025-02-03"
    assert 'Today is {{ "03 Feb 2025" }}' in (run / "chat_template.jinja").read_text()
    assert f"--chat-template {run / 'chat_template.jinja'}" in done.stdout, "a server would show today's date"


def test_a_length_that_cuts_every_completion_away_is_told_with_one_that_does_not(tiny_planner, tmp_path):
    given = ["--format", "json-plan", "--dataset", "generated:shares", "--max-samples", "9", "--max-seq-len"]
    done = run_script("dummy_planner.py", *small(tiny_planner, str(tmp_path / "run")), *given, "5")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "error: --max-seq-len 5 leaves no token to imitate" in last, done.stderr
    whole = re.search(r"the shortest prompt has (\d+): give more \((\d+) cuts nothing\)", last)
    assert whole is not None and int(whole[1]) < int(whole[2]) and not (tmp_path / "run").exists()


def test_a_warm_up_that_the_run_would_not_leave_is_told_with_its_steps(capsys):
    from common.training.sft import tell_warmup

    small = {**DEFAULTS, "batch_size": 4, "grad_accum": 2}  # 49 rows: 13 passes, 7 steps
    tell_warmup(SupervisedArgs(**small, warmup_steps=6), rows=49)
    tell_warmup(SupervisedArgs(**{**small, "num_epochs": 1.1}, warmup_steps=7), rows=49)
    assert capsys.readouterr().err == ""
    tell_warmup(SupervisedArgs(**small, warmup_steps=7), rows=49)
    assert "--warmup-steps 7: in the run's 7 steps the learning rate never reaches --lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["--format", "json-plan", "--dataset", "./none.jsonl"], 2, "does not exist"),
        (["--lr", "-1"], 2, "--lr must be greater than 0"),
        (["--resume"], 2, "must name the folder of a run"),
        (["--demo", "--max-samples", "1"], 2, "low=1&high=5 gives 1 row to imitate: at least two are needed"),
    ],
)
def test_wrong_input_is_one_line(given, code, message, tmp_path):
    done = run_script("dummy_planner.py", "--output-dir", str(tmp_path / "run"), *given)
    assert done.returncode == code
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
