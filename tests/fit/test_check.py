"""`--check`: its estimate equals what a run really needs, it reports what is missing, and loads and writes nothing."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import flags, free_port, needs_bf16, run_script
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from common import models
from common.fit.check import _memory_table, _step_lines, does_not_fit
from common.fit.memory import GIB, Machine, Part, estimate, peak
from common.fit.shape import model_shape
from common.fit.step import Step, Wave, step_of
from common.problems.questions import load_questions
from common.settings.grpo import TrainingArgs

# https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct/blob/main/config.json
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip


def check(args: TrainingArgs, *more: str, env: dict[str, str] | None = None):
    return run_script("grpo_training.py", *flags(args), "--check", *more, env=env)


@pytest.mark.parametrize("cpu_dtype", ["float32", "bfloat16"])
def test_the_estimate_is_what_a_training_step_holds(tiny_args, cpu_dtype):
    """Counted on a real trainer: parameters, the adapter, and what autograd keeps of a micro-batch."""
    from common.training.grpo import build_trainer

    if cpu_dtype == "bfloat16":
        needs_bf16()
    tiny_args.cpu_dtype, tiny_args.max_steps = cpu_dtype, 1
    tokenizer, questions = models.load_tokenizer(tiny_args.base_model), load_questions(tiny_args.dataset, limit=4)
    shape = model_shape(AutoConfig.from_pretrained(tiny_args.base_model), tiny_args)
    step = step_of(tiny_args, questions, tokenizer)

    trainer, _ = build_trainer(tiny_args, questions, tokenizer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = [value for value in model.parameters() if value.requires_grad]
    assert shape.trained == sum(value.numel() for value in trained)
    assert shape.parameters == sum(value.numel() for value in model.parameters()) - shape.trained
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    whole, tokens = trainer.compute_loss, []

    def counted(model, inputs, *others, **options):
        kept.clear()
        # Columns that are padding in the whole micro-batch are not run.
        tokens.append(tuple(int(inputs[f"{part}_mask"].any(dim=0).sum()) for part in ("prompt", "completion")))
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            return whole(model, inputs, *others, **options)

    trainer.compute_loss = counted
    trainer.train()
    prompt, tiny_args.max_completion_length = tokens[-1]
    assert prompt <= step.planner_prompt
    machine = Machine(False, "here", GIB, GIB, four_bit=False, cpu_dtype=cpu_dtype)
    parts = estimate(tiny_args, shape, replace(step, planner_prompt=prompt), machine)
    activations = next(part.bytes for part in parts if part.name.startswith("activations"))
    assert 0.9 < activations / sum(kept.values()) < 1.3, (activations, sum(kept.values()))


@pytest.mark.parametrize("layers", [1, None])
def test_models_with_fused_projections_get_an_adapter_on_as_many_layers_as_asked_for(layers):
    """GPT-NeoX has none of the usual names; what is counted without weights is what the run would train."""
    config = GPTNeoXConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    args = TrainingArgs(lora_layers=layers, lora_r=4)
    base = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, models.lora_config(args, base))
    trained = {name: value.numel() for name, value in model.named_parameters() if value.requires_grad}
    assert all(".layers.2." in name for name in trained) == (layers == 1)
    for name in ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"):
        assert any(f"{name}.lora_A" in each for each in trained)
    shape = model_shape(config, args)
    assert (sum(trained.values()), shape.open_layers, shape.known_head) == (shape.trained, layers or 3, False)


def test_a_check_reads_no_weights_writes_nothing_and_says_what_a_step_is(tiny_args, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_args.base_model, folder)
    (folder / "model.safetensors").write_text("nothing that could be loaded")
    tiny_args.base_model = str(folder)
    done = check(tiny_args)
    assert done.returncode == 0, done.stderr
    assert "2 questions × 4 = 8 completions, 480 tokens at most" in done.stdout
    assert "it fits, and nothing is missing" in done.stdout
    kind = "bf16" if models.multiplies_bf16() else "fp32"
    assert f"products    matrix products in {kind} (--cpu-dtype auto)" in done.stdout
    assert not Path(tiny_args.output_dir).exists()
    tiny_args.lora_layers = 100
    for done in (check(tiny_args), run_script("grpo_training.py", *flags(tiny_args))):  # before the weights are read
        assert done.returncode == 2 and "--lora-layers 100: the base model has " in done.stderr
    tiny_args.lora_layers, tiny_args.lora_r = None, 65
    done = check(tiny_args)
    assert done.returncode == 2 and "--lora-r 65: no matrix of the base model has a rank above 64" in done.stderr
    tiny_args.lora_r = 64
    assert check(tiny_args).returncode == 0
    (folder / "model.safetensors").unlink()
    for done in (check(tiny_args), run_script("grpo_training.py", *flags(tiny_args))):
        assert done.returncode == 2 and "holds no weights" in done.stderr
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text('{"model_type": "llama", "hidd')
        done = run_script("grpo_training.py", *flags(tiny_args))
        assert done.returncode == 2 and f"its {name} cannot be read (Unterminated string" in done.stderr


def test_one_of_a_kind_has_no_plural_and_numbers_end_in_one_column():
    step = Step(1, 4, 100, Wave(1, 0, 9), Wave(0, 0, 9), None)
    lines = _step_lines(TrainingArgs(max_steps=1, num_generations=4), step, questions=4)
    assert "1 question × 4 = 4 completions, 2,048 tokens at most; 1 worker call and 256 of" in lines
    assert "1 step draws 1 question from 4: each 0.25 times" in lines
    assert "2 steps draw 2 questions" in _step_lines(TrainingArgs(max_steps=2), step, questions=4)
    big = Machine(False, "this machine", 2048 * GIB, GIB, four_bit=False)
    rows = _memory_table([Part("libraries", GIB / 2)], big).strip().splitlines()
    assert len({len(row) for row in rows}) == 1 and rows[-2].endswith(" 2048.00") and rows[-1].endswith(" 1.00")


def test_every_missing_thing_is_a_line_of_its_own(tiny_args, tmp_path):
    """No Hub, no login, no server, and too few questions: all are reported together, in seconds, and no traceback."""
    tiny_args.wandb, tiny_args.embedding_model = True, "nobody/no-encoder"
    tiny_args.worker_url, tiny_args.grad_accum = f"http://127.0.0.1:{free_port()}/v1", 8
    offline = {
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HOME": str(tmp_path),
        "WANDB_BASE_URL": "https://api.wandb.ai", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"),
    }  # fmt: skip
    done = check(tiny_args, env=offline)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    for said in (
        "gives 4 questions, one step takes 8",
        "W&B would be offline",
        "--embedding-model nobody/no-encoder is not on this machine",
        "--worker-url",
    ):
        assert sum(said in line for line in lines) == 1, (said, lines)
    assert len(lines) == 4, lines
    tiny_args.base_model, tiny_args.worker_url, tiny_args.wandb = "nobody/no-model", None, False
    done = check(tiny_args, env=offline)
    assert done.returncode == 2 and "--base-model nobody/no-model is not on this machine" in done.stderr
    tiny_args.grad_accum = 2
    done = check(tiny_args, env=offline)  # all that is wrong lies outside: the run itself would end with 1 too
    assert done.returncode == 1 and "gives 4 questions" not in done.stderr, done.stderr
    assert run_script("grpo_training.py", *flags(tiny_args), env=offline).returncode == 1
    assert "memory, at most" not in done.stdout and "Traceback" not in done.stderr


def test_a_hub_that_hangs_up_is_told_in_one_line(tiny_args, tmp_path):
    """It accepts a connection and closes it without a reply, so the error is one of huggingface_hub's client."""
    with socket.create_server(("127.0.0.1", 0)) as hub:

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # the socket is closed at the end of the test
                while True:
                    hub.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        tiny_args.embedding_model = "nobody/no-encoder"
        place = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        }
        for done in (check(tiny_args, env=place), run_script("grpo_training.py", *flags(tiny_args), env=place)):
            last = done.stderr.strip().splitlines()[-1]
            assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
            assert "error: --embedding-model nobody/no-encoder cannot be loaded (" in last, done.stderr


def test_a_run_that_does_not_fit_is_told_with_what_to_change():
    args = TrainingArgs()
    shape = model_shape(LLAMA_8B, args)
    step = Step(2, 8, 400, Wave(64, 0, 400), Wave(8, 0, 3000), None)
    card = Machine(True, "a card", 24 * GIB, 23.5 * GIB, four_bit=True)
    parts = estimate(args, shape, step, card)
    assert shape.parameters == 8_030_261_248 and shape.trained == 41_943_040
    assert does_not_fit(args, parts, card) == [], f"{peak(parts, card) / GIB:.1f} GiB"
    plain = Machine(True, "a card", 24 * GIB, 16 * GIB, four_bit=False)
    (line,) = does_not_fit(args, estimate(args, shape, step, plain), plain)
    assert "a card has 24.0" in line and "16.0 are free" in line and "end other programs, or " in line
    assert "--4bit" in line
    args.gradient_checkpointing, args.batch_size = False, 16
    (line,) = does_not_fit(args, estimate(args, shape, step, card), card)
    assert "--gradient-checkpointing" in line and "lower --batch-size" in line
    wide = TrainingArgs(lora_r=2048)
    (line,) = does_not_fit(wide, estimate(wide, model_shape(LLAMA_8B, wide), step, card), card)
    assert "most of it is for adapter" in line and "lower --lora-r (2048)" in line
    shared = TrainingArgs(vllm_python="python", vllm_gpu_memory=0.8)
    (line,) = does_not_fit(shared, estimate(shared, shape, step, card), card)
    assert "the vLLM server: lower --vllm-gpu-memory" in line
