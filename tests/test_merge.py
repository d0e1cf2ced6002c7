"""Merging: a real model and a real adapter, what is on disk afterwards, and what stops a merge."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file, save_file

import merge_and_push
from common import certificate, models, prompts
from common.args import PACKAGED_MODEL
from common.errors import UserError

HEAVY = {"torch", "transformers", "peft", "huggingface_hub", "numpy"}
REPO = ["--repo-name", "user/planner", "--no-push"]


def merge(adapter, target, *flags: str) -> int:
    """The script's own `main`, in this process: torch is imported here already."""
    return merge_and_push.main(["--adapter-path", str(adapter), "--local-save-path", str(target), *REPO, *flags])


def refused(adapter, target, *flags: str) -> UserError:
    with pytest.raises(UserError) as caught:
        merge(adapter, target, *flags)
    return caught.value


def report_of(folder: Path) -> dict:
    return json.loads((folder / "certification.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def edited(adapter, target: Path, change=None, config=None) -> Path:
    """A copy of an adapter with other tensors or another config."""
    shutil.copytree(adapter, target, ignore=shutil.ignore_patterns("checkpoint-*"))
    if change is not None:
        tensors = load_file(target / "adapter_model.safetensors")
        save_file(change(tensors) or tensors, target / "adapter_model.safetensors", {"format": "pt"})
    if config is not None:
        path = target / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def delta(adapter: Path, name: str) -> torch.Tensor:
    """The update of one weight, written out: alpha / r · B·A (arXiv:2106.09685)."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    stem = "base_model.model." + name.removesuffix(".weight")
    product = tensors[f"{stem}.lora_B.weight"].float() @ tensors[f"{stem}.lora_A.weight"].float()
    return product * config["lora_alpha"] / config["r"]


@pytest.fixture(scope="session")
def adapter(finished_run) -> Path:
    """An adapter of the tiny planner, trained by grpo_training.py."""
    return finished_run[1]


@pytest.fixture(scope="session")
def merged(adapter, tmp_path_factory) -> Path:
    """The tiny planner merged, in several weight files."""
    target = tmp_path_factory.mktemp("merged") / "planner"
    assert merge(adapter, target, "--max-shard-size", "5MB") == 0
    return target


# ----------------------------------------------------------------------------------------- what a merge is


def plain_peft_text(base: str, adapter: Path, messages: list[dict[str, str]]) -> str:
    """What adapter on base writes, with PEFT and transformers alone."""
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
    """The second documented command, which names no base model."""
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
    # The adapter does something, and the merge error is nothing beside it.
    assert found["adapter_effect"]["mean_kl"] > 0.01
    assert found["difference"]["mean_kl"] < 1e-6 * found["adapter_effect"]["mean_kl"]
    messages = prompts.planner_messages(certificate.QUESTIONS[0], "short")
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_PROJECT, str(target), json.dumps(messages)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain_peft_text(models.resolve_model(PACKAGED_MODEL), smollm2_adapter, messages)
    # Tokenizer, chat template and generation config came along.
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
    # The unquantised base is another model, and can be had on request.
    assert merge(trained, tmp_path / "other", "--merge-base", "bf16") == 0
    assert not torch.allclose(
        found["model.layers.0.mlp.up_proj.weight"], weights_of(tmp_path / "other")["model.layers.0.mlp.up_proj.weight"]
    )


# --------------------------------------------------------------------------------------- the certification


def test_a_wrong_merge_is_beyond_the_tolerance(smollm2_adapter):
    """What the certificate is for: mistakes that a merge script really can make, on the real model.

    Only the logits are judged here: the plans are taken as equal.
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
    """A base in bf16 and a small update: every merged weight rounds back to the base's own."""
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
    # Asked again, it is still refused, without merging again.
    assert refused(small, tmp_path / "merged", *flags).exit_code == 4
    assert merge(small, tmp_path / "wide", *flags, "--dtype", "float32") == 0
    assert report_of(tmp_path / "wide")["certificate"]["update_kept"] > 0.99


def test_an_adapter_that_learned_nothing_is_reported(adapter, tmp_path, capsys):
    def nothing(tensors):
        return {name: value * (0 if "lora_B" in name else 1) for name, value in tensors.items()}

    assert merge(edited(adapter, tmp_path / "zero", nothing), tmp_path / "merged") == 0
    assert "the adapter changes nothing" in capsys.readouterr().err
    assert report_of(tmp_path / "merged")["certificate"]["learned_nothing"] is True
    assert "changes nothing" in (tmp_path / "merged" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ the card


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


# --------------------------------------------------------------------------------------- what stops a merge


def test_wrong_input_is_one_line_exit_code_2_and_light(finished_run, adapter, merged, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for name, text in {
        "broken.md": "---\ntags: [a\n---\n# x\n", "tags.md": "---\ntags: planner\n---\n# x\n",
        "list.md": "---\n- a\n---\n# x\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.md").write_bytes(b"# caf\xe9\n")
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    for name, content in (("cut", whole[:-100]), ("headless", whole[:5]), ("noise", os.urandom(4000))):
        edited(adapter, tmp_path / name)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
    edited(adapter, tmp_path / "nojson")
    (tmp_path / "nojson" / "adapter_config.json").write_text('{"r": ')
    changed = tmp_path / "changed"
    shutil.copytree(merged, changed)
    (changed / "config.json").write_text((changed / "config.json").read_text() + " ")
    name = ["--repo-name", "user/name"]
    good = [*name, "--adapter-path", str(adapter), "--no-push"]
    cases = {
        "no repo name": (["--adapter-path", str(adapter)], "--repo-name is required"),
        "bad repo name": (["--repo-name", "a/b/c"], "a/b/c is no Hub repo"),
        "no adapter": ([*name, "--adapter-path", str(tmp_path / "none")], "is not a folder"),
        "no adapter in it": ([*name, "--adapter-path", str(tmp_path / "full")], "adapter_config.json is missing"),
        "cut off": ([*name, "--adapter-path", str(tmp_path / "cut")], "its header promises"),
        "headless": ([*name, "--adapter-path", str(tmp_path / "headless")], "is cut off at 5 bytes"),
        "noise": ([*name, "--adapter-path", str(tmp_path / "noise")], "adapter_model.safetensors"),
        "config": ([*name, "--adapter-path", str(tmp_path / "nojson")], "is not valid JSON"),
        "other base": ([*good, "--base-model", "meta-llama/Llama-3.1-8B-Instruct"], "was trained on"),
        "no base": ([*good, "--base-model", "./none"], "does not exist"),
        "revision": ([*good, "--revision", "main"], "has no revisions"),
        "shard size": ([*good, "--max-shard-size", "5"], "500MB or 5GB"),
        "dtype": ([*good, "--dtype", "int8"], "float32"),
        "card": ([*good, "--model-card", str(tmp_path / "none.md")], "is not a file"),
        "card broken": ([*good, "--model-card", str(tmp_path / "broken.md")], "is no valid model card"),
        "card list": ([*good, "--model-card", str(tmp_path / "list.md")], "is no valid model card"),
        "card bytes": ([*good, "--model-card", str(tmp_path / "latin.md")], "is no valid model card"),
        "card tags": ([*good, "--model-card", str(tmp_path / "tags.md")], "a list of texts"),
        "target a file": ([*good, "--local-save-path", str(tmp_path / "file")], "is a file"),
        "target in use": ([*good, "--local-save-path", str(tmp_path / "full"), "--overwrite"], "no merge of this script"),
        "target the adapter": ([*good, "--local-save-path", str(adapter)], "holds the adapter, which would be replaced"),
        "target above the adapter": ([*good, "--local-save-path", str(adapter.parent)], "holds the adapter"),
        "target the base": ([*good, "--local-save-path", finished_run[0].base_model], "holds the base model"),
        "repo with dashes": (["--repo-name", "user/a--b"], "is no Hub repo"),
        "another merge": ([*good, "--local-save-path", str(merged)], "holds another merge (max_shard_size"),
        "changed since": ([*good, "--local-save-path", str(changed), "--max-shard-size", "5MB"], "were changed since"),
        "nothing to push with": ([*name, "--adapter-path", str(adapter)], "no Hub token found"),
    }  # fmt: skip
    env = {"HF_TOKEN": "", "HF_HOME": str(tmp_path / "home")}
    for title, (flags, message) in cases.items():
        done = run_script("merge_and_push.py", *flags, env=env)
        errors = [line for line in done.stderr.splitlines() if line.startswith("merge_and_push.py: error")]
        assert done.returncode == 2, (title, done.stderr)
        assert len(errors) == 1 and message in errors[0], (title, done.stderr)
        assert "Traceback" not in done.stderr, title
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
    code = (
        "import sys, merge_and_push\n"
        f"try: merge_and_push.main({['--repo-name', 'a/b', '--adapter-path', str(tmp_path / 'cut')]!r})\n"
        "except merge_and_push.UserError: pass\n"
        f"heavy = set(sys.modules) & {HEAVY!r}\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_base_of_the_same_name_and_another_shape_is_found_before_it_is_loaded(adapter, tiny_planner, tmp_path):
    base = tmp_path / "tiny-planner"
    base.mkdir()
    config = json.loads((Path(tiny_planner) / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": 96, "head_dim": 24}))
    error = refused(adapter, tmp_path / "merged", "--base-model", str(base))  # there are no weights to load
    assert error.exit_code == 2 and "has shape" in str(error) and "name the base model" in str(error)
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert "that the base has no place for" in str(refused(adapter, tmp_path / "merged", "--base-model", str(base)))
    (base / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert "stored quantised (gptq)" in str(refused(adapter, tmp_path / "merged", "--base-model", str(base)))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("damage", ["nan", "missing", "rank", "targets"])
def test_a_damaged_adapter_is_found_before_the_base_is_loaded(damage, adapter, tmp_path):
    def change(tensors):
        name = max(tensors)
        if damage == "nan":
            tensors[name][0, 0] = float("nan")
        if damage == "missing":
            del tensors[name]

    config = {"rank": {"r": 8}, "targets": {"target_modules": ["c_attn"]}}.get(damage)
    message = {"nan": "NaN", "missing": "lacks 1 tensors", "rank": "has shape", "targets": "c_attn"}[damage]
    error = refused(edited(adapter, tmp_path / "damaged", change, config), tmp_path / "merged")
    assert error.exit_code == 2 and message in str(error)
    assert not (tmp_path / "merged").exists()


def test_a_finished_merge_is_not_done_again_and_replaced_when_asked(adapter, tmp_path, capsys):
    target = tmp_path / "merged"
    assert merge(adapter, target) == 0
    stamp = (target / "model.safetensors").stat().st_mtime_ns
    assert merge(adapter, target) == 0
    assert "holds this merge already" in capsys.readouterr().err
    assert (target / "model.safetensors").stat().st_mtime_ns == stamp
    assert merge(adapter, target, "--dtype", "float16", "--overwrite") == 0
    assert weights_of(target)["model.norm.weight"].dtype == torch.float16
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes, in memory; needs the right to mount."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("no right to mount a small file system here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_disk_that_is_too_small_is_found_before_the_merge(adapter, small_disk):
    disk = small_disk(20_000_000)
    error = refused(adapter, disk / "merged")
    assert error.exit_code == 2 and "20.0 MB free" in str(error) and "are missing" in str(error)
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up_during_the_merge_leaves_nothing(adapter, small_disk):
    """Somebody else fills a real file system once the merge has started."""
    disk = small_disk(50_000_000)

    def fill() -> None:
        while not list(disk.glob(".merging-*")):
            time.sleep(0.01)
        try:
            with (disk / "filler").open("wb") as stream:
                while stream.write(bytes(1_000_000)):
                    stream.flush()
        except OSError:
            pass  # full, as intended

    filler = threading.Thread(target=fill)
    filler.start()
    error = refused(adapter, disk / "merged")
    filler.join()
    assert error.exit_code == 1 and "could not be written" in str(error) and "No space left" in str(error)
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_write_that_fails_leaves_what_was_there(adapter, tmp_path):
    """The same without the right to mount: a limit on the size of files, as a quota sets it."""
    target = tmp_path / "merged"
    assert merge(adapter, target) == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    done = subprocess.run(
        [sys.executable, str(ROOT / "merge_and_push.py"), "--adapter-path", str(adapter), "--local-save-path", str(target),
         *REPO, "--overwrite"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def obey_permissions() -> None:
    """Run in the child before it starts: root without the capability to write where the mode forbids it."""
    if os.geteuid() == 0:
        drop_from_bounding_set, may_write_everywhere = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: capabilities(7)
        ctypes.CDLL(None).prctl(drop_from_bounding_set, may_write_everywhere)


def test_a_folder_without_permission_is_found_before_the_merge(adapter, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    flags = ["--adapter-path", str(adapter), *REPO, "--local-save-path", str(locked / "merged")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "merge_and_push.py"), *flags],
        preexec_fn=obey_permissions, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "cannot be written (Permission denied)" in done.stderr and "Traceback" not in done.stderr


def test_a_merge_that_is_stopped_leaves_nothing(adapter, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "merge_and_push.py"), "--adapter-path", str(adapter),
         "--local-save-path", str(tmp_path / "merged"), *REPO],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".merging-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert not list(tmp_path.iterdir())
