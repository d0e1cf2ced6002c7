"""Real GRPO runs: real TRL and PEFT, a real frozen worker, checkpoints, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import QUESTIONS, ROOT, flags, needs_bf16, run_script

from common import models, prompts
from common.problems.questions import load_questions
from common.reports.jsonl import read_jsonl
from common.runs.checkpoints import checkpoint_step, complete_checkpoints
from common.workers.local import FrozenWorker


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("four_bit", "cpu_dtype"),
    [(False, "float32"), (False, "bfloat16"), (True, "auto")],
    ids=["fp32", "bf16", "nf4"],
)
def test_worker_equals_a_separate_base_model_while_the_adapter_moves(tiny_args, four_bit, cpu_dtype):
    """Inside reward calls, with gradient checkpointing and dropout, where a simple worker fails (docs/architecture.md)."""
    from common.models import load_base, load_tokenizer
    from common.training.grpo import build_trainer

    if cpu_dtype == "bfloat16":
        needs_bf16()
    tiny_args.use_4bit, tiny_args.cpu_dtype = four_bit, cpu_dtype
    tiny_args.gradient_checkpointing = True
    tiny_args.lora_dropout = 0.2
    tokenizer = load_tokenizer(tiny_args.base_model)
    questions = load_questions(tiny_args.dataset, limit=10)
    trainer, executor = build_trainer(tiny_args, questions, tokenizer)
    base = load_base(tiny_args.base_model, four_bit=four_bit).eval()
    separate = FrozenWorker(base, tokenizer, max_tokens=24, cpu_dtype=cpu_dtype)
    asked = [prompts.planner_messages(question, "short") for question in QUESTIONS]  # prompts that it can answer
    expected = separate.generate(asked)
    assert all(answer.tokens > 10 for answer in expected)

    model = trainer.accelerator.unwrap_model(trainer.model)
    base_before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    adapters: list[torch.Tensor] = []
    reward = trainer.reward_funcs[0]
    getter = executor.worker._model

    def probing(**kwargs):
        assert model.training and torch.is_grad_enabled(), "the trap is only set in train mode with gradients on"
        scored = reward(**kwargs)
        # without cached answers of earlier calls
        fresh = FrozenWorker(getter, tokenizer, max_tokens=24, cpu_dtype=cpu_dtype)
        assert fresh.generate(asked) == expected
        assert model.training and torch.is_grad_enabled(), "the guard must put everything back"
        adapters.append(torch.cat([p.detach().flatten().float() for p in model.parameters() if p.requires_grad]))
        return [float(number % 2) if value is not None else None for number, value in enumerate(scored)]

    probing.__name__ = "probing"
    trainer.reward_funcs[0] = probing
    trainer.train()
    assert len(adapters) == tiny_args.max_steps
    assert all(not torch.equal(before, after) for before, after in pairwise(adapters))
    for name, parameter in model.named_parameters():
        if name in base_before:
            assert torch.equal(parameter, base_before[name]), f"{name} of the base model has moved"


def test_a_worker_call_leaves_the_gradients_of_a_4bit_model_alone(tiny_planner):
    """On some CPUs bitsandbytes repacks 4-bit layers in eval mode for a kernel without a gradient."""
    from peft import LoraConfig, get_peft_model

    from common.models import load_base, load_tokenizer

    tokenizer = load_tokenizer(tiny_planner)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(load_base(tiny_planner, four_bit=True), config).train()
    ids = tokenizer(QUESTIONS[0], return_tensors="pt").input_ids

    def gradients() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])

    before = gradients()
    FrozenWorker(model, tokenizer, max_tokens=4).solve_directly(QUESTIONS[0])
    assert before.abs().max() > 0
    assert torch.equal(gradients(), before)


def test_a_run_leaves_every_artifact(finished_run):
    args, folder, done = finished_run
    for name in (
        "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "tokenizer.json",
        "special_tokens_map.json", "chat_template.jinja", "training_config.json", "metrics.jsonl", "samples.jsonl",
        "training_curves.png", "checkpoint-2", "checkpoint-4",
    ):  # fmt: skip
        assert (folder / name).exists(), name
    assert not list(folder.glob(".saving*"))
    record = json.loads((folder / "training_config.json").read_text())
    assert record["settings"] == args.to_dict() | {"use_4bit": False, "cpu_dtype": models.cpu_dtype(args)}
    assert record["versions"]["trl"].startswith("1.16") and record["seed"] == 42 and record["data_fingerprint"]
    assert str(folder) in done.stdout and "--lora-modules recursive_reasoner=" in done.stdout
    assert "no GPU found" in done.stderr


def test_metrics_and_samples_tell_what_happened(finished_run):
    args, folder, _ = finished_run
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    for name in (
        "loss", "reward", "reward_std", "correctness", "decomposition_rate", "invalid_plan_rate", "planner_tokens",
        "worker_tokens", "independence", "subproblems_per_plan", "cache_hit_rate", "worker_seconds",
        "planner_seconds", "embedding_seconds", "gradient_seconds", "rest_seconds",
        "worker_failures", "worker_cut_off_rate", "no_answer_rate", "entropy", "frac_reward_zero_std",
    ):  # fmt: skip
        assert any(line.get(name) is not None for line in metrics), name
    samples = read_jsonl(folder / "samples.jsonl")
    per_step = args.batch_size * args.grad_accum
    assert [sample["step"] for sample in samples] == [step for step in (1, 2, 3, 4) for _ in range(per_step)]
    for step, line in enumerate(metrics, start=1):
        rows = [sample for sample in samples if sample["step"] == step]
        assert line["reward"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows), abs=1e-5)
        finals = [row for row in rows if row["final"] is not None]
        if finals:
            assert line["no_answer_rate"] == pytest.approx(sum(row["answer"] is None for row in finals) / len(finals))
        assert line["invalid_plan_rate"] == pytest.approx(sum(row["plan"] is None for row in rows) / len(rows))
    split = next(sample for sample in samples if sample["plan"] and sample["plan"]["should_decompose"])
    assert len(split["solutions"]) == len(split["plan"]["subproblems"]) and split["final"] is not None


def test_the_saved_adapter_loads_in_plain_peft_and_differs_from_the_base(finished_run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args, folder, _ = finished_run
    weights = adapter_weights(folder)
    assert any(name.endswith("lora_B.weight") and value.abs().max() > 0 for name, value in weights.items())
    projections = {name.split(".")[-3] for name in weights}
    assert projections == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.base_model), str(folder)).eval()
    prompt = tokenizer(prompts.render(tokenizer, prompts.planner_messages(QUESTIONS[0], "short")), return_tensors="pt")
    with_adapter = model(**prompt).logits
    with model.disable_adapter():
        assert not torch.equal(model(**prompt).logits, with_adapter)


def test_resume_gives_the_same_result_as_never_having_stopped(finished_run, tmp_path):
    """Step, data order, optimiser state and random numbers continue, so the last two steps are equal bit by bit."""
    _, folder, _ = finished_run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoint-4")
    # A newer checkpoint that was not written completely must not be used.
    shutil.copytree(copy / "checkpoint-2", copy / "checkpoint-3")
    whole = (copy / "checkpoint-3" / "optimizer.pt").read_bytes()
    (copy / "checkpoint-3" / "optimizer.pt").write_bytes(whole[: len(whole) // 2])
    done = run_script("grpo_training.py", "--output-dir", str(copy), "--resume")
    assert done.returncode == 0 and "so nothing is trained" not in done.stderr, done.stderr
    assert [line["step"] for line in read_jsonl(copy / "metrics.jsonl")] == [1, 2, 3, 4]
    keys = ("question", "completion", "reward", "step")
    expected = [[row[key] for key in keys] for row in read_jsonl(folder / "samples.jsonl")]
    assert [[row[key] for key in keys] for row in read_jsonl(copy / "samples.jsonl")] == expected
    expected_weights = adapter_weights(folder)
    assert all(torch.equal(value, expected_weights[name]) for name, value in adapter_weights(copy).items())


def test_wandb_goes_offline_with_one_line_and_without_it_nothing_of_it_is_imported(tiny_args, tmp_path):
    tiny_args.max_steps, tiny_args.wandb = 1, True
    no_login = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "RECURSIVE_REASONER_CACHE": str(models.cache_dir())}
    done = run_script("grpo_training.py", *flags(tiny_args), env=no_login)
    assert done.returncode == 0, done.stderr
    assert sum("wandb sync" in line for line in done.stderr.splitlines()) == 1
    assert list(Path(tiny_args.output_dir).glob("wandb/**/*.wandb"))
    code = (
        "import sys, grpo_training\n"
        f"assert grpo_training.main({[*flags(tiny_args), '--no-wandb', '--overwrite']!r}) == 0\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'wandb' and sys.modules[name] is not None]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_resume_refuses_what_would_make_it_another_run(finished_run, tmp_path):
    _, folder, _ = finished_run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = run_script("grpo_training.py", "--output-dir", str(copy), "--resume", "--lora-r", "4")
    assert done.returncode == 2 and "--lora-r 4 differs" in done.stderr
    done = run_script("grpo_training.py", "--output-dir", str(copy), "--no-wandb")
    assert done.returncode == 2 and "already holds a run" in done.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_resumed_run_follows_its_new_number_of_steps_and_saves_as_it_is_told(tiny_args):
    """Learning rate and checkpoints come from the new settings; the checkpoint holds the earlier ones."""
    tiny_args.max_steps, tiny_args.lr_schedule = 2, "linear"
    assert run_script("grpo_training.py", *flags(tiny_args)).returncode == 0
    folder = Path(tiny_args.output_dir)
    done = run_script(
        "grpo_training.py", "--output-dir", str(folder), "--resume", "--max-steps", "5", "--save-steps", "1"
    )
    assert done.returncode == 0, done.stderr
    rates = [line["learning_rate"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 5e-4, 6e-4, 4e-4, 2e-4])
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4", "checkpoint-5"}


def test_a_run_stopped_after_its_last_step_is_only_finished(finished_run, tmp_path):
    _, folder, _ = finished_run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "adapter_model.safetensors").unlink()
    done = run_script("grpo_training.py", "--output-dir", str(copy), "--resume")
    assert done.returncode == 0, done.stderr
    assert f"the run in {copy} has all of its 4 steps, so nothing is trained: give more with --max-steps" in done.stderr
    assert [line["step"] for line in read_jsonl(copy / "metrics.jsonl")] == [1, 2, 3, 4]
    expected = adapter_weights(folder)
    assert all(torch.equal(value, expected[name]) for name, value in adapter_weights(copy).items())
    record = (copy / "training_config.json").read_bytes()
    fewer = run_script("grpo_training.py", "--output-dir", str(copy), "--resume", "--max-steps", "3")
    assert fewer.returncode == 2 and "--max-steps 3: the run in" in fewer.stderr and "has done 4" in fewer.stderr
    assert (copy / "training_config.json").read_bytes() == record


def test_plans_beyond_the_models_context_are_refused_before_anything_is_generated(tiny_planner, tmp_path):
    done = run_script(
        "grpo_training.py", "--base-model", tiny_planner, "--dataset", "generated:shares", "--max-samples", "8",
        "--max-completion-length", "999999", "--no-wandb", "--output-dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 2 and "leaves the model's context of" in done.stderr
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_the_other_script_does_not_take_the_run_for_its_own(finished_run):
    _, folder, _ = finished_run
    done = run_script("dummy_planner.py", "--output-dir", str(folder), "--resume")
    assert done.returncode == 2 and "holds a run of grpo_training.py, not of dummy_planner.py" in done.stderr


def test_training_goes_on_from_an_adapter(finished_run, tiny_args):
    _, folder, _ = finished_run
    tiny_args.adapter_path = str(folder)
    tiny_args.max_steps = 1
    tiny_args.lr = 1e-9  # no weight changes, so the saved weights are the loaded ones
    done = run_script("grpo_training.py", *flags(tiny_args))
    assert done.returncode == 0, done.stderr
    before, after = adapter_weights(folder), adapter_weights(Path(tiny_args.output_dir))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tiny_args, number):
    tiny_args.max_steps = 500
    tiny_args.save_steps = 400
    folder = Path(tiny_args.output_dir)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "grpo_training.py"), *flags(tiny_args)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=dict(os.environ),
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert f"--output-dir {folder} --resume" in errors
    (checkpoint,) = complete_checkpoints(folder)
    steps = checkpoint_step(checkpoint)
    assert len(read_jsonl(folder / "metrics.jsonl")) == steps
    assert not (folder / "adapter_model.safetensors").exists(), "an unfinished run must not look finished"
    done = run_script("grpo_training.py", "--output-dir", str(folder), "--resume", "--max-steps", str(steps + 1))
    assert done.returncode == 0, done.stderr
    assert read_jsonl(folder / "metrics.jsonl")[-1]["step"] == steps + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_gpu_run_is_4bit_by_default(tiny_args):
    tiny_args.use_4bit = None
    done = run_script("grpo_training.py", *[flag for flag in flags(tiny_args) if flag != "--no-4bit"])
    assert done.returncode == 0, done.stderr
    assert json.loads((Path(tiny_args.output_dir) / "training_config.json").read_text())["four_bit"] is True


def test_fewer_questions_than_a_step_takes_is_said_before_anything_is_trained(tiny_args):
    tiny_args.grad_accum = 8  # eight groups of four, and there are four questions
    done = run_script("grpo_training.py", *flags(tiny_args))
    assert done.returncode == 2
    assert "gives 4 questions, one step takes 8" in done.stderr


def trainer_with_an_adapter(tiny_args):
    """The trainer of a run in fp32, with an adapter that changes the planner."""
    from common.training.grpo import build_trainer

    tiny_args.gradient_checkpointing, tiny_args.cpu_dtype = False, "float32"
    tokenizer = models.load_tokenizer(tiny_args.base_model)
    trainer, _ = build_trainer(tiny_args, load_questions(tiny_args.dataset, limit=10), tokenizer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)  # at 0 no gradient reaches lora_A
    return trainer, model


def padded(rows: list[tuple[list[int], list[int]]], left: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts and completions, as TRL pads them."""
    ids = torch.tensor([[0] * (left - len(p)) + p + c + [0] * (wide - len(c)) for p, c in rows])
    mask = torch.tensor([[0] * (left - len(p)) + [1] * len(p + c) + [0] * (wide - len(c)) for p, c in rows])
    return ids, mask


def scored_as_by_trl(trainer, model, ids: torch.Tensor, mask: torch.Tensor, wide: int) -> tuple[int, int]:
    """Log-probabilities, entropies and gradient equal TRL's. Returns how many tokens the embedding reads: TRL's, ours."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    read: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *call: read.append(call[1][0].numel()))

    def scored(method):
        model.zero_grad()
        read.clear()
        logps, entropy, _ = method(trainer, model, ids, mask, wide, compute_entropy=True)
        real = mask[:, -wide:] == 1
        assert logps.shape == entropy.shape == real.shape
        (logps * torch.arange(1.0, logps.numel() + 1).view(logps.shape))[real].sum().backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return logps.detach()[real], entropy.detach()[real], gradient, sum(read)

    expected = scored(GRPOTrainer._get_per_token_logps_and_entropies)
    ours = scored(type(trainer)._get_per_token_logps_and_entropies)
    handle.remove()
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-4)
    for name, gradient in expected[2].items():
        torch.testing.assert_close(
            ours[2][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-8, msg=name
        )
    assert any(float(gradient.abs().max()) > 0 for name, gradient in expected[2].items() if "lora_A" in name)
    return expected[3], ours[3]


@pytest.mark.parametrize(
    ("beginning", "longest", "read_tokens"),
    [(0, 3, 2 * 5 + 4 * 4), (0, 40, 2 * 5 + 3 * 4 + 41), (80, 3, 82 + 2 * 3 + 4 * 4)],
)
def test_shared_prompts_and_passes_by_length_give_the_gradient_of_trl(tiny_args, beginning, longest, read_tokens):
    """Each prompt is run once, and what both begin with once for both; padding is not computed: all is as in TRL."""
    trainer, model = trainer_with_an_adapter(tiny_args)
    first = list(range(70, 70 + beginning))
    prompts_of = [[*first, 5, 6, 7, 8, 9, 10], [*first, 5, 6, 11, 12]]
    rows = [
        (prompts_of[0], [20, 21, 22]),
        (prompts_of[1], [23, 24]),
        (prompts_of[0], [25]),
        (prompts_of[1], list(range(26, 26 + longest))),
    ]
    # TRL pads to the longest prompt (here two tokens longer) and completion (two longer than ours) of all micro-batches.
    wide, left = longest + 2, beginning + 8
    ids, mask = padded(rows, left, wide)
    assert scored_as_by_trl(trainer, model, ids, mask, wide) == (4 * (left + wide), read_tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_without_an_adapter_run_in_rollouts_only(tiny_args, attention):
    """The training step takes over what they gave then, and its loss is as in TRL. It runs them for other rows."""
    tiny_args.lora_layers = 1
    trainer, model = trainer_with_an_adapter(tiny_args)
    model.get_base_model().set_attn_implementation(attention)
    first = list(range(70, 150))  # read once for both prompts in the rollouts, and once more in the training step
    asked = [[*first, 5, 6, 7, 8, 9, 10], [*first, 5, 6, 11, 12]] * 2
    told, _ = trainer._generate_single_turn(asked)
    wide = max(map(len, told)) + 2
    rows = list(zip(asked, told, strict=True))
    ids, mask = padded(rows, 88, wide)
    assert scored_as_by_trl(trainer, model, ids, mask, wide) == (4 * (88 + wide), 0)
    rows[3] = asked[3], [20, 21, 22]
    ids, mask = padded(rows, 88, wide)
    assert scored_as_by_trl(trainer, model, ids, mask, wide)[1] > 0
