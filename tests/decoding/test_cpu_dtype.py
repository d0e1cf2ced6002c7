"""bf16 on a CPU: results that must equal those of fp32 do, others are close, and a run keeps its dtype."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import flags, needs_bf16, run_script
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from common import models, prompts
from common.decoding.decode import decode
from common.decoding.log_probs import TOKENS_AT_ONCE, passes_by_length, token_log_probs
from common.decoding.packing import NEAR, packed_linears
from common.errors import UserError
from common.models import precision
from common.problems.questions import load_questions
from common.reports.jsonl import read_jsonl
from common.settings.grpo import TrainingArgs
from common.workers.local import FrozenWorker
from tests.benchmarks import mix

RATIO = "sampling/importance_sampling_ratio/mean"


@pytest.fixture
def bf16():
    needs_bf16()


@pytest.mark.parametrize(
    ("asked", "four_bit", "native", "expected"),
    [
        ("auto", False, True, "bfloat16"),
        ("auto", False, False, "float32"),
        ("auto", True, True, "float32"),
        ("float32", False, True, "float32"),
        ("bfloat16", False, True, "bfloat16"),
        ("bfloat16", False, False, "this processor has no instructions"),
        ("bfloat16", True, True, "leave out --4bit"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not read the setting")
def test_auto_is_bf16_only_where_it_pays_and_what_cannot_be_had_is_refused(
    monkeypatch, asked, four_bit, native, expected
):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: native)
    args = TrainingArgs(cpu_dtype=asked, use_4bit=four_bit)
    if expected in ("float32", "bfloat16"):
        assert models.cpu_dtype(args) == expected
    else:
        with pytest.raises(UserError, match=expected):
            models.cpu_dtype(args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not read the setting")
def test_auto_is_fp32_where_servers_sample_so_that_the_proof_of_who_wrote_a_plan_is_sharp(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
    for served in ({"vllm_url": "http://127.0.0.1:8000/v1"}, {"vllm_python": "python"}):
        assert models.cpu_dtype(TrainingArgs(use_4bit=False, **served)) == "float32"
        assert models.cpu_dtype(TrainingArgs(use_4bit=False, cpu_dtype="bfloat16", **served)) == "bfloat16"


def test_answers_are_counted_alike_and_mostly_the_same(bf16, smollm2):
    model, tokenizer = smollm2
    requests = [prompts.direct_messages(group[0].question, "few-shot") for group in mix.load_groups()[:10]]
    single, half = (
        FrozenWorker(model, tokenizer, style="few-shot", max_tokens=24, cpu_dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    expected, found = single.generate(requests), half.generate(requests)
    assert sum(a == b for a, b in zip(expected, found, strict=True)) >= 0.7 * len(expected)
    assert all(0 < answer.tokens <= 24 for answer in found)
    assert all(answer.finished for answer in found if answer.tokens < 24)
    assert half.take_stats().generated_tokens == sum(answer.tokens for answer in found), "no question comes twice"
    # In another batch a sum may round differently, more so in bf16. Rarely, this changes which of two near ties wins.
    alone = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=24, cpu_dtype="bfloat16", batch_tokens=1)
    again = alone.generate(requests[:4])
    assert sum(a == b for a, b in zip(again, found[:4], strict=True)) >= 3
    weights = {name for name, parameter in model.named_parameters() if parameter.dtype != torch.float32}
    assert not weights, "only copies are in bf16"


def test_logits_are_close_and_those_of_likely_tokens_are_those_of_fp32(bf16, smollm2):
    model, tokenizer = smollm2
    ids = tokenizer([prompts.render(tokenizer, prompts.direct_messages("What is 3 + 9?"))], return_tensors="pt")
    head = model.get_output_embeddings()
    with torch.no_grad():
        expected = model(**ids, output_hidden_states=True)
        with packed_linears(model, rows=8, steps=64, cpu_dtype="bfloat16"):
            found = model(**ids, output_hidden_states=True)
            same_hidden = head(expected.hidden_states[-1])
        again = model(**ids).logits
    near = expected.logits >= expected.logits.amax(dim=-1, keepdim=True) - NEAR / 2
    torch.testing.assert_close(same_hidden[near], expected.logits[near], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same_hidden, expected.logits, rtol=0.02, atol=0.2)
    assert not torch.equal(same_hidden, expected.logits), "the head is in bf16"
    assert found.logits.dtype == torch.float32 and found.logits.shape == expected.logits.shape
    away = (found.logits - expected.logits).abs()
    assert 0 < float(away.mean()) < 0.1 and float(away.max()) < 1.5
    torch.testing.assert_close(again, expected.logits, msg="afterwards the layers are the plain ones again")


def test_weights_stored_in_bf16_give_the_logits_gradients_and_answers_of_fp32_weights(bf16, tiny_planner):
    """Autocast and packed copies convert fp32 weights to bf16 anyway. Stored so, they take half the memory."""
    tokenizer = models.load_tokenizer(tiny_planner)
    ids = tokenizer.encode("What is 2 + 3? Say it in words.")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    found = []
    for cpu_dtype in ("float32", "bfloat16"):
        torch.manual_seed(1)
        model = get_peft_model(models.load_base(tiny_planner, four_bit=False, cpu_dtype=cpu_dtype), config).eval()
        for name, parameter in model.named_parameters():
            if "lora" in name:
                assert parameter.dtype == torch.float32, "what is trained is fp32"
                torch.manual_seed(len(name))
                torch.nn.init.normal_(parameter.data)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.tensor([ids])).logits
        logits.float().square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        with packed_linears(model, rows=8, steps=20, cpu_dtype="bfloat16"):
            answer = decode(
                model.get_base_model(), [ids], max_new_tokens=20, pad_id=tokenizer.pad_token_id,
                eos_ids=frozenset([tokenizer.eos_token_id]),
            )  # fmt: skip
        linear = model.get_base_model().model.layers[0].mlp.up_proj.weight
        assert str(linear.dtype) == f"torch.{cpu_dtype}"
        assert model.get_base_model().get_output_embeddings().weight.dtype == torch.float32
        plain = model(torch.tensor([ids])).logits
        assert plain.dtype == torch.float32, "also without autocast and packed copies"
        again = model.float()(torch.tensor([ids])).logits
        assert torch.equal(again, plain), "also after an engine has converted the weights"
        found.append((logits, gradients, answer))
    (logits, gradients, answer), (expected, expected_gradients, expected_answer) = found
    assert torch.equal(logits, expected) and answer == expected_answer and len(gradients) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


@pytest.mark.parametrize("entries", [192, 200, 50])
@pytest.mark.parametrize("scale", [4.0, 0.001])
def test_logits_near_the_largest_are_exact_wherever_they_are(bf16, entries, scale):
    """Also for a vocabulary that blocks do not divide, and where all tokens are almost equally likely."""
    generator = torch.Generator().manual_seed(5)
    head = torch.nn.Linear(32, entries)
    with torch.no_grad():
        head.weight.copy_(scale * torch.randn(entries, 32, generator=generator))
        head.bias.copy_(scale * torch.randn(entries, generator=generator))
        hidden = torch.randn(3, 40, 32, generator=generator)
        model = SimpleNamespace(modules=lambda: [head], get_output_embeddings=lambda: head)
        expected = head(hidden)
        with packed_linears(model, rows=8, steps=64, cpu_dtype="bfloat16"):
            found = head(hidden)
    near = expected >= expected.amax(dim=-1, keepdim=True) - NEAR / 2
    assert found.shape == expected.shape and near.sum() >= 120
    torch.testing.assert_close(found[near], expected[near], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))


def test_sampled_log_probabilities_are_those_of_the_policy(tiny_planner):
    """With either dtype, the log-probabilities from decoding are those of a forward pass over the samples."""
    tokenizer = models.load_tokenizer(tiny_planner)
    model = models.load_base(tiny_planner, four_bit=False).eval()
    ids = [tokenizer.encode(text) for text in ("What is 2 + 3?", "Say hello to everyone here.", "What is 2 + 3?")]
    said: list[list[float]] = []
    outputs = decode(
        model, ids, max_new_tokens=12, eos_ids=frozenset([tokenizer.eos_token_id]), pad_id=tokenizer.pad_token_id,
        temperature=0.7, generator=torch.Generator().manual_seed(1), log_probs=said,
    )  # fmt: skip
    assert [len(row) for row in said] == [len(row) for row in outputs]
    for prompt, answer, found in zip(ids, outputs, said, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / 0.7, dim=-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=1e-3)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7), cost=st.integers(0, 30))
def test_passes_by_length_hold_each_row_once_and_cost_least(lengths, cost):
    passes = passes_by_length(lengths, cost)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    assert all(lengths[rows[0]] == max(lengths[row] for row in rows) for rows in passes)

    def cheapest(rows):
        """Of all ways to divide: the first row with every subset of the others."""
        if not rows:
            return 0
        first, *others = rows
        return min(
            (1 + len(chosen)) * max([first, *(others[i] for i in chosen)]) + cost
            + cheapest([length for i, length in enumerate(others) if i not in chosen])
            for size in range(len(others) + 1)
            for chosen in itertools.combinations(range(len(others)), size)
        )  # fmt: skip

    assert sum(len(rows) * lengths[rows[0]] + cost for rows in passes) == cheapest(lengths)


@pytest.mark.parametrize("count", [0, 5, 2 * TOKENS_AT_ONCE + 1])
@pytest.mark.parametrize(
    ("dtype", "near", "entropy_near"),
    [(torch.bfloat16, (0.01, 0.25), (0.05, 0.05)), (torch.float32, (1e-5, 1e-4), (1e-4, 1e-4))],
)
def test_log_probabilities_entropies_and_gradient_of_the_head(count, dtype, near, entropy_near):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, 64, generator=generator, requires_grad=True)
    head, targets = torch.randn(1000, 64, generator=generator), torch.randint(1000, (count,), generator=generator)
    weights = torch.randn(count, generator=generator)
    exact = torch.log_softmax(hidden @ head.T / 0.8, dim=-1)
    expected = exact.gather(1, targets[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
    found, entropies, likeliest = token_log_probs(hidden, head, targets, 0.8, dtype)
    (ours,) = torch.autograd.grad((found * weights).sum(), hidden)
    assert not entropies.requires_grad
    assert dtype is torch.bfloat16 or torch.equal(likeliest, exact.argmax(dim=1) == targets)
    torch.testing.assert_close(found, expected, rtol=near[0], atol=near[1])
    torch.testing.assert_close(entropies, -(exact.exp() * exact).sum(1), rtol=entropy_near[0], atol=entropy_near[1])
    if count:
        similar = float(torch.cosine_similarity(ours.flatten(), gradient.flatten(), dim=0))
        assert similar > (0.999 if dtype is torch.bfloat16 else 0.999999)


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
def test_the_gradient_of_few_and_of_almost_certain_tokens_is_exact_too(dtype, near):
    """A trained planner is nearly certain of most tokens, and thousands that never occur are all as unlikely."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(64, generator=generator) / 2  # by all rows, as in a real head
    head = torch.randn(49_152, 64, generator=generator) * 0.02
    head[:10] *= 20  # the tokens that occur
    targets = torch.tensor([1, 2, 3, 4, 9_000])
    hidden = head[[1, 2, 3, 4, 0]] * torch.tensor([1.0, 1.5, 2.0, 2.3, 2.05])[:, None]
    head, hidden = (head + shared).to(dtype), hidden.to(dtype)
    odds = torch.softmax(hidden.double() @ head.double().T, dim=-1)
    expected = head[targets].double() - odds @ head.double()
    hidden = hidden.float().requires_grad_()
    (ours,) = torch.autograd.grad(token_log_probs(hidden, head.float(), targets, 1.0, dtype)[0].sum(), hidden)
    assert float(((ours - expected).norm(dim=1) / expected.norm(dim=1)).max()) < near


def test_a_training_step_has_the_gradient_of_fp32(bf16, tiny_args):
    """Uses the trainer's own method with shared prompts. Masks and shapes are equal, numbers are close."""
    from common.training.grpo import build_trainer

    tokenizer = models.load_tokenizer(tiny_args.base_model)
    questions = load_questions(tiny_args.dataset, limit=10)
    ids = [
        tokenizer.encode(prompts.render(tokenizer, prompts.planner_messages(q.question, "short")))
        for q in questions[:2]
    ]
    width = max(map(len, ids))
    answers = torch.randint(5, 200, (4, 7), generator=torch.Generator().manual_seed(2))
    rows = [[0] * (width - len(p)) + p + a for p, a in zip([*ids, *ids], answers.tolist(), strict=True)]
    real = torch.ones(4, width + 7, dtype=torch.long)
    for row, prompt in enumerate([*ids, *ids]):
        real[row, : width - len(prompt)] = 0
    real[3, -2:] = 0  # a shorter answer
    found = {}
    for dtype in ("float32", "bfloat16"):
        tiny_args.cpu_dtype = dtype
        trainer, _ = build_trainer(tiny_args, questions, tokenizer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        torch.manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        log_probs, entropies, _ = trainer._get_per_token_logps_and_entropies(
            model, torch.tensor(rows), real, 7, compute_entropy=True
        )
        (log_probs * torch.linspace(-1, 1, 28).view(4, 7)).sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.float32}
        gradient = torch.cat([parameter.grad.flatten() for parameter in trained])
        found[dtype] = log_probs.detach(), entropies.detach(), gradient
    (expected, entropy, gradient), (ours, our_entropy, our_gradient) = found["float32"], found["bfloat16"]
    assert ours.shape == expected.shape and ours.dtype == torch.float32
    assert torch.equal(ours == 0, expected == 0), "what is padding is padding in both"
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.2)
    torch.testing.assert_close(our_entropy, entropy, rtol=0.05, atol=0.1)
    assert float(torch.cosine_similarity(our_gradient, gradient, dim=0)) > 0.999


def test_a_run_records_its_dtype_compares_rollouts_and_resumes_bit_for_bit(bf16, tiny_args, tmp_path):
    tiny_args.max_steps, tiny_args.save_steps, tiny_args.cpu_dtype = 4, 2, "auto"
    done = run_script("grpo_training.py", *flags(tiny_args))
    assert done.returncode == 0, done.stderr
    assert "bf16" in next(line for line in done.stderr.splitlines() if "no GPU found" in line)
    folder, copy = tmp_path / "run", tmp_path / "copy"
    record = json.loads((folder / "training_config.json").read_text())
    assert record["settings"]["cpu_dtype"] == "bfloat16", "auto is recorded as what it was"
    lines = read_jsonl(folder / "metrics.jsonl")
    assert [math.isclose(line[RATIO], 1, abs_tol=0.05) for line in lines if RATIO in line] == [True]

    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoint-4")
    refused = run_script("grpo_training.py", "--output-dir", str(copy), "--resume", "--cpu-dtype", "float32")
    assert refused.returncode == 2 and "--cpu-dtype float32 differs" in refused.stderr
    done = run_script("grpo_training.py", "--output-dir", str(copy), "--resume")
    assert done.returncode == 0, done.stderr
    adapter = "adapter_model.safetensors"
    assert (copy / adapter).read_bytes() == (folder / adapter).read_bytes()
    # The worker's answers come with the checkpoint, because an answer in bf16 depends on the batch it is made in.
    hits, hits_again = ([line["cache_hit_rate"] for line in read_jsonl(f / "metrics.jsonl")] for f in (folder, copy))
    assert hits_again == hits and max(hits[2:]) > 0


def test_a_run_from_before_the_setting_goes_on_in_fp32(tmp_path):
    from common.runs.record import run_record, stored_settings

    settings = TrainingArgs(output_dir=str(tmp_path)).to_dict()
    del settings["cpu_dtype"]
    (tmp_path / "training_config.json").write_text(json.dumps(run_record(settings, script="grpo_training.py")))
    assert stored_settings(tmp_path, {}, set(), "grpo_training.py")["cpu_dtype"] == "float32"


def test_groups_with_an_adapter_decode_like_single_prompts(bf16, tiny_planner):
    tokenizer = models.load_tokenizer(tiny_planner)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(models.load_base(tiny_planner, four_bit=False), config).eval()
    texts = [f"What is {a} + {a + 3}?" for a in range(6)]
    ids = [tokenizer.encode(text) for text in texts]
    options = {"max_new_tokens": 16, "eos_ids": frozenset([tokenizer.eos_token_id]), "pad_id": tokenizer.pad_token_id}
    with packed_linears(model, rows=6, steps=16, cpu_dtype="bfloat16"):
        together = decode(model.get_base_model(), ids, **options)
        assert [decode(model.get_base_model(), [row], **options)[0] for row in ids] == together
