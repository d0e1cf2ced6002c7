"""Merge a real adapter into a real model, and check the files on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT, run_script
from merges import edited, merge, refused, report_of, weights_of
from safetensors.torch import load_file

from common import models, prompts
from common.merging import certificate
from common.merging.report import certificate_table
from common.runs.adapters import adapter_origin
from common.settings.grpo import PACKAGED_MODEL


def delta(adapter: Path, name: str) -> torch.Tensor:
    """The update of one weight, computed directly: alpha / r · B A (arXiv:2106.09685)."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    stem = "base_model.model." + name.removesuffix(".weight")
    product = tensors[f"{stem}.lora_B.weight"].float() @ tensors[f"{stem}.lora_A.weight"].float()
    return product * config["lora_alpha"] / config["r"]


def plain_peft_text(base: str, adapter: Path, messages: list[dict[str, str]]) -> str:
    """Text of adapter on base, with only PEFT and transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(written[0, asked["input_ids"].shape[1] :])


WITHOUT_THE_PROJECT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, messages = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
written = model.generate(**asked, max_new_tokens=40, do_sample=False)
sys.stdout.write(tokenizer.decode(written[0, asked["input_ids"].shape[1]:]))
assert not any(name.split(".")[0] in ("common", "peft") for name in sys.modules)
"""


def test_a_real_model_merges_into_one_that_plans_the_same(smollm2_adapter, tmp_path):
    """The second documented command, without a base model."""
    target = tmp_path / "merged"
    done = run_script(
        "merge_and_push.py", "--adapter-path", str(smollm2_adapter), "--repo-name", "user/name",
        "--local-save-path", str(target), "--no-push",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "certified" in done.stdout and "peak memory" in done.stdout
    report = report_of(target)
    found = report["certificate"]
    assert report["inputs"]["base_model"] == PACKAGED_MODEL
    assert found["passed"] and found["equal_plans"] == len(found["plans"]) == 8
    assert found["difference"]["equal_tokens"] == 1
    # The adapter changes something, and the error of the merge is much smaller than that.
    assert found["adapter_effect"]["mean_kl"] > 0.01
    assert found["difference"]["mean_kl"] < 1e-6 * found["adapter_effect"]["mean_kl"]
    messages = prompts.planner_messages(certificate.QUESTIONS[0], "short")
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_PROJECT, str(target), json.dumps(messages)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain_peft_text(models.resolve_model(PACKAGED_MODEL), smollm2_adapter, messages)
    # Tokenizer, chat template and generation config were copied too.
    expected = prompts.render(models.load_tokenizer(str(smollm2_adapter)), messages)
    assert prompts.render(models.load_tokenizer(str(target)), messages) == expected
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_folder_holds_safetensors_in_shards_and_nothing_of_the_adapter(merged, adapter, tiny_planner):
    names = {path.name for path in merged.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "special_tokens_map.json", "model.safetensors.index.json", "certification.json", "README.md",
    }  # fmt: skip
    assert len(list(merged.glob("*.safetensors"))) > 1
    assert not any(name.startswith(("adapter_", ".")) or name.endswith((".bin", ".pt")) for name in names)
    assert not list(merged.parent.glob(".merging*"))
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in merged.iterdir()), "unreadable for a server's user"
    base, found = weights_of(Path(tiny_planner)), weights_of(merged)
    assert found.keys() == base.keys()
    for name, value in base.items():
        changed = value + delta(adapter, name) if "proj" in name else value
        assert torch.allclose(found[name], changed, atol=1e-6), name


def test_a_16_bit_merge_adds_in_fp32_and_rounds_once(adapter, tiny_planner, tmp_path):
    assert merge(adapter, tmp_path / "merged", "--dtype", "bfloat16") == 0
    base, found = weights_of(Path(tiny_planner)), weights_of(tmp_path / "merged")
    for name, value in base.items():
        exact = value + delta(adapter, name) if "proj" in name else value
        assert torch.equal(found[name], exact.bfloat16()), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_4bit_adapter_goes_onto_the_dequantised_weights_it_was_trained_on(adapter, tiny_planner, tmp_path):
    import bitsandbytes.functional as bnb

    trained = edited(adapter, tmp_path / "trained")
    record = json.loads((trained / "training_config.json").read_text())
    (trained / "training_config.json").write_text(json.dumps({**record, "four_bit": True}))
    assert merge(trained, tmp_path / "merged") == 0
    found, base = weights_of(tmp_path / "merged"), weights_of(Path(tiny_planner))
    for name, value in base.items():
        if "proj" in name:
            codes, state = bnb.quantize_4bit(value, blocksize=64, compress_statistics=True, quant_type="nf4")
            value = bnb.dequantize_4bit(codes, state) + delta(trained, name)
        assert torch.allclose(found[name], value, atol=1e-6), name
    report = report_of(tmp_path / "merged")
    assert report["inputs"]["merge_base"] == "nf4" and report["certificate"]["passed"]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "dequantised NF4" in (tmp_path / "merged" / "README.md").read_text()
    # Merging into the unquantised base gives another model; it is possible on request.
    assert merge(trained, tmp_path / "other", "--merge-base", "bf16") == 0
    assert not torch.allclose(
        found["model.layers.0.mlp.up_proj.weight"], weights_of(tmp_path / "other")["model.layers.0.mlp.up_proj.weight"]
    )


# --------------------------------------------------------------------------------------- the certification


def test_a_wrong_merge_is_beyond_the_tolerance(smollm2_adapter):
    """Mistakes that a merge script can really make, on the real model.

    Only the logits are compared here; the plans count as equal.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    tokenizer = models.load_tokenizer(str(smollm2_adapter))
    asked = certificate.planner_prompts(tokenizer, "short")
    model = PeftModel.from_pretrained(models.load_base(PACKAGED_MODEL, four_bit=False), str(smollm2_adapter))
    plans = [plan[:12] for plan in certificate.write_plans(model, tokenizer, asked, adapter=True)]

    def evidence() -> certificate.Evidence:
        return certificate.Evidence(plans, certificate.predictions(model, asked, plans, adapter=True))

    reference = evidence()
    base_logits = certificate.predictions(model, asked, plans, adapter=False)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for dtype in ("float32", "bfloat16"):
        model.to(getattr(torch, dtype))
        for fault, scales in {
            "none": [1.0] * len(layers),
            "a quarter of the layers left out": [0.0 if n < len(layers) // 4 else 1.0 for n in range(len(layers))],
            "scale forgotten": [layer.r["default"] / layer.lora_alpha["default"] for layer in layers],
            "not merged": [0.0] * len(layers),
        }.items():
            for layer, scale in zip(layers, scales, strict=True):
                layer.set_scale("default", scale)
            found = certificate.certify(tokenizer, reference, base_logits, evidence(), update_kept=1.0, dtype=dtype)
            assert found.passed == (fault == "none"), (fault, dtype, found.problems, found.difference)


def test_an_update_that_rounding_swallows_is_refused_and_fp32_keeps_it(adapter, tiny_planner, tmp_path, capsys):
    """With a base model in bf16 and a small update, every merged weight rounds back to the base weight."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base" / "tiny-planner"
    AutoModelForCausalLM.from_pretrained(tiny_planner, dtype=torch.bfloat16).save_pretrained(base)
    models.load_tokenizer(tiny_planner).save_pretrained(base)

    def smaller(tensors):
        return {name: value * (1e-3 if "lora_B" in name else 1) for name, value in tensors.items()}

    small = edited(adapter, tmp_path / "small", smaller)
    flags = ["--base-model", str(base)]
    error = refused(small, tmp_path / "merged", *flags)
    assert error.exit_code == 4 and "of the adapter's update" in str(error) and "--dtype float32" in str(error)
    assert report_of(tmp_path / "merged")["certificate"]["passed"] is False
    assert "beyond the limits" in (tmp_path / "merged" / "README.md").read_text()
    assert "NOT certified" in capsys.readouterr().out
    # A second attempt is refused too, without merging again.
    assert refused(small, tmp_path / "merged", *flags).exit_code == 4
    assert merge(small, tmp_path / "wide", *flags, "--dtype", "float32") == 0
    assert report_of(tmp_path / "wide")["certificate"]["update_kept"] > 0.99


def test_an_error_larger_than_the_adapters_effect_is_noted_though_it_is_within_the_limits():
    found = json.loads((ROOT / "docs" / "demo_certification.json").read_text())["certificate"]
    assert "note" not in certificate_table(found)
    found["difference"]["mean_kl"], found["adapter_effect"]["mean_kl"] = 0.00093, 0.00018
    larger = "note: the merge's error (mean KL 0.00093) is larger than the adapter's effect (0.00018)"
    assert certificate_table(found).splitlines()[-1] == larger
    found["dtype"] = "bfloat16"
    assert certificate_table(found).splitlines()[-1] == f"{larger}: try --dtype float32"
    found["learned_nothing"] = True
    assert "note" not in certificate_table(found)


def test_an_adapter_that_learned_nothing_is_reported(adapter, tmp_path, capsys):
    def nothing(tensors):
        return {name: value * (0 if "lora_B" in name else 1) for name, value in tensors.items()}

    assert merge(edited(adapter, tmp_path / "zero", nothing), tmp_path / "merged") == 0
    assert "the adapter changes nothing" in capsys.readouterr().err
    assert report_of(tmp_path / "merged")["certificate"]["learned_nothing"] is True
    assert "changes nothing" in (tmp_path / "merged" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ the card


def test_a_checkpoint_has_the_record_of_its_run(finished_run):
    _, folder, _ = finished_run
    record, base = adapter_origin(str(folder / "checkpoint-2"), None)
    assert (
        record == json.loads((folder / "training_config.json").read_text()) and base == record["settings"]["base_model"]
    )


def test_the_card_says_what_the_hub_wants_to_know(merged):
    from huggingface_hub import ModelCard

    card = ModelCard.load(merged / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"grpo", "planner", "merged"} <= set(data["tags"])
    for part in ("# planner", "vllm", "## Training", "num_generations: 4", "update kept", "8 of 8"):
        assert part in card.text, part
    for path in merged.glob("*"):
        assert str(merged.parents[1]).encode() not in path.read_bytes(), (
            f"{path.name} holds a path of the author's machine"
        )


def test_the_card_carries_evaluation_and_the_base_models_license(adapter, tiny_planner, tmp_path):
    from huggingface_hub import ModelCard

    base = tmp_path / "tiny-planner"
    shutil.copytree(tiny_planner, base)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://x.org/l\n---\n# Tiny\n"
    )
    scored = edited(adapter, tmp_path / "scored")
    row = {"accuracy": 0.625, "interval_95": [0.5, 0.75], "total_tokens": 61.4}
    (scored / "evaluation.json").write_text(
        json.dumps({"questions": 40, "rows": {"direct": row, "trained planner": row}})
    )
    assert merge(scored, tmp_path / "merged", "--base-model", str(base)) == 0
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.license == "other" and card.data.license_name == "tiny"
    assert card.data.eval_results[0].metric_value == 0.625
    assert "| trained planner | 62.5 % | 50.0 to 75.0 % | 61 |" in card.text


def test_a_card_of_ones_own_is_completed_not_replaced(merged, adapter, tmp_path):
    from huggingface_hub import ModelCard

    own = tmp_path / "CARD.md"
    own.write_text("---\nlicense: mit\ntags:\n- mine\nmy_key: 7\n---\n# My planner\n\nMy text.\n")
    target = tmp_path / "merged"
    shutil.copytree(merged, target)
    assert merge(adapter, target, "--max-shard-size", "5MB", "--model-card", str(own)) == 0
    card = ModelCard.load(target / "README.md")
    assert card.data.license == "mit" and card.data.to_dict()["my_key"] == 7
    assert card.data.tags[0] == "mine" and "planner" in card.data.tags
    assert card.data.library_name == "transformers"
    assert card.text.lstrip().startswith("# My planner\n\nMy text.") and "How the merge was checked" in card.text
