"""Wrong input, damaged files, full disks and signals stop a merge; nothing is lost or left behind."""

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
from merges import REPO, edited, merge, refused, weights_of

HEAVY = {"torch", "transformers", "peft", "huggingface_hub", "numpy"}


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
        "no owner": (["--repo-name", "name", "--no-push"], "--repo-name name has no owner"),
        "private, no push": ([*name, "--private", "--no-push"], "leave one of them out"),
        "token, no push": ([*good, "--token", "hf_secret"], "--token is the Hub's, and --no-push needs no Hub"),
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
        "card broken": ([*good, "--model-card", str(tmp_path / "broken.md")], "is not a valid model card"),
        "card list": ([*good, "--model-card", str(tmp_path / "list.md")], "is not a valid model card"),
        "card bytes": ([*good, "--model-card", str(tmp_path / "latin.md")], "): save it as UTF-8"),
        "card tags": ([*good, "--model-card", str(tmp_path / "tags.md")], "a list of texts"),
        "target a file": ([*good, "--local-save-path", str(tmp_path / "file")], "is a file"),
        "target in use": ([*good, "--local-save-path", str(tmp_path / "full"), "--overwrite"], "no merge of this script"),
        "target the adapter": ([*good, "--local-save-path", str(adapter)], "holds the adapter, which would be replaced"),
        "target above the adapter": ([*good, "--local-save-path", str(adapter.parent)], "holds the adapter"),
        "target in the adapter": ([*good, "--local-save-path", str(adapter / "merged")], "lies in the folder of the adapter"),
        "target in the base": (
            [*good, "--local-save-path", f"{finished_run[0].base_model}/merged"], "lies in the folder of the base model",
        ),
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


@pytest.mark.filterwarnings("error:.*was renamed")  # PEFT's warning about a base that lies elsewhere now
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
    message = {"nan": "NaN", "missing": "lacks 1 tensor that", "rank": "has shape", "targets": "c_attn"}[damage]
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


def test_a_kill_while_the_card_is_written_does_not_spoil_the_finished_merge(merged, adapter, tmp_path, capsys):
    target = tmp_path / "merged"
    shutil.copytree(merged, target)
    whole = sorted(path.name for path in target.iterdir())
    (target / "README.md").rename(target / ".README.md.a1b2c3_4.tmp")  # as `write_text_atomically` names it
    assert merge(adapter, target, "--max-shard-size", "5MB") == 0
    assert "holds this merge already" in capsys.readouterr().err
    assert sorted(path.name for path in target.iterdir()) == whole


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of a given size (bytes) in memory; needs the right to mount."""
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
    """Another program fills a real file system after the merge has started."""
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
    """The same without the right to mount: file sizes are limited, as by a quota."""
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
    """Runs in the child process: root loses the capability to write where the file mode forbids it."""
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
