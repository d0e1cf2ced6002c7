"""Files that others have made, in any state: one clear line, no code of them is run, no file is written elsewhere."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from campaigns.targets import sample_adapter, sample_tokenizer
from conftest import failure

from common import models, prompts
from common.errors import UserError, UserErrors
from common.evaluation.scoreboard import stored_rows
from common.fit.check import check_run
from common.inference.batch import already_answered, read_input
from common.inference.trained_settings import read_training_settings, with_trained
from common.merging.certificate import finished_merge
from common.problems.questions import check_source
from common.runs.adapters import adapter_origin, safetensors_problem, save_tokenizer
from common.runs.record import read_run_record
from common.settings.grpo import TrainingArgs


def test_a_message_is_one_line_whatever_texts_come_into_it():
    error = UserError("column 'a\nb\x1b[2J\u2028' of \ud83d\tfile")
    assert str(error) == "column 'a b?[2J ' of ? file"
    assert str(UserErrors(["a\nb", "c"])) == "a b\nc"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("max_steps", "3", "--max-steps must be int, found '3'"),
        ("max_steps", True, "--max-steps must be int, found True"),
        ("max_steps", 10**400, "--max-steps is too large a number"),
        ("seed", 2**32, "--seed must be below 4294967296, found 4294967296"),
        ("lr", [], r"--lr must be float, found \[\]"),
        ("planner_style", "long", "--planner-style must be full, short, found 'long'"),
        ("dataset", None, "--dataset must be str, found None"),
        ("use_4bit", "no", "--4bit must be bool or null, found 'no'"),
    ],
)
def test_stored_settings_are_checked_as_flags_are(name, value, told):
    with pytest.raises(UserError, match=told):
        TrainingArgs.from_dict({**TrainingArgs().to_dict(), name: value}).validate()


def test_settings_beside_a_served_adapter_are_checked_too(tmp_path):
    path = tmp_path / "training_config.json"
    path.write_text(json.dumps({"settings": {"planner_style": "long", "max_subproblems": "3"}}))
    with pytest.raises(UserErrors) as caught:
        with_trained({}, read_training_settings(path)).validate()
    assert len(caught.value.messages) == 2


@pytest.mark.parametrize("change", [{"prompt_date": 3}, {"prompt_date": "soon"}, {"processes": "2"}, {"settings": "x"}])
def test_a_record_that_no_run_wrote_is_told(tmp_path, change):
    record = {"settings": {"output_dir": "x"}, "script": "grpo_training.py"}
    (tmp_path / "training_config.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(UserError, match=r"training_config\.json cannot be read"):
        read_run_record(tmp_path)


@pytest.mark.parametrize(
    "header", [b"[]", b'{"a": 3}', b'{"a": {}}', b'{"a": {"data_offsets": [0]}}', b'{"a": {"data_offsets": [0, "x"]}}',
               b'{"a": {"data_offsets": [0, 1e999]}}', b"[" * 5000, b"\xff"],
)  # fmt: skip
def test_a_weights_file_with_any_header_is_told(tmp_path, header):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert safetensors_problem(path) == f"{path} is not a safetensors file"


def test_numbers_and_depths_that_json_cannot_hold_are_told_with_their_line(tmp_path):
    for content in (b'{"question": ' + b"9" * 5000 + b"}", b"[" * 9000):
        (tmp_path / "q.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=r"q\.jsonl:1: not valid JSON"):
            check_source(str(tmp_path / "q.jsonl"))


def test_answers_that_are_none_are_not_taken_for_a_resume(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"question": "a"}\n')
    asked = read_input(str(tmp_path / "in.jsonl"))
    for record in ({"line": [1], "question": "a"}, {"question": None}, {"line": {}, "question": "a"}):
        (tmp_path / "out.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(UserError, match="holds answers to other questions"):
            already_answered(tmp_path / "out.jsonl", asked)


@pytest.mark.parametrize("change", [{"row": []}, {"fingerprint": 0.5}, {"question": None}])
def test_a_scoreboard_that_is_none_is_told(tmp_path, change):
    row = {"row": "direct", "question": "a", "error": None, "seconds": 1.0, "fingerprint": {"a": "b"}, **change}
    (tmp_path / "evaluation.jsonl").write_text(json.dumps({k: v for k, v in row.items() if v is not None or k == "x"}))
    with pytest.raises(UserError, match="holds something else than rows of a scoreboard"):
        stored_rows(tmp_path)


def test_a_report_that_is_none_is_told(tmp_path):
    for report in ({"inputs": {}}, {"inputs": [], "files": {}, "certificate": {}}, {"files": {}}):
        (tmp_path / "certification.json").write_text(json.dumps(report))
        with pytest.raises(UserError, match="no report of a merge"):
            finished_merge(tmp_path, {}, overwrite=False)


@pytest.mark.parametrize("change", [{"target_parameters": "x"}, {"lora_ga_config": 1}, {"task_type": "²"}])
def test_an_adapter_config_that_peft_refuses_is_told(tmp_path, change):
    folder = tmp_path / "adapter"
    sample_adapter(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    adapter_origin(str(folder), None)
    with pytest.raises(UserError, match="could not be loaded"):
        models.lora_config(TrainingArgs(adapter_path=str(folder)), None)


def test_an_adapter_whose_base_has_no_name_is_told(tmp_path):
    sample_adapter(tmp_path / "adapter")
    change_config(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=[1])
    with pytest.raises(UserError, match=r"base_model_name_or_path is \[1\]"):
        adapter_origin(str(tmp_path / "adapter"), "packaged/SmolLM2-135M-Instruct")


def test_a_wait_that_is_no_number_and_a_reply_without_end_are_told(server):
    def fault(handler, request):
        if request:
            handler.error(429, "slow", Retry_After="\xb2")
        return bool(request)

    server.fault = fault
    assert failure(server, "--no-probe", "--question", "Q", "--json")[0] == 1
    server.fault = lambda handler, request: bool(request) and not handler.reply("[" * 100_000)
    code, line = failure(server, "--no-probe", "--question", "Q", "--json")
    assert code == 1 and "no OpenAI-compatible server" in line


def change_config(folder: Path, name: str, **change: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **change}))


def test_a_chat_template_whose_name_is_a_path_is_told_at_the_start(tmp_path):
    """transformers saves several templates under their names. "../../x" would end a run at its first checkpoint."""
    folder = tmp_path / "model"
    sample_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": prompts.PLAIN_CHAT_TEMPLATE}, {"name": "tool_use", "template": "x"}]
    change_config(folder, "tokenizer_config.json", chat_template=templates)
    save_tokenizer(models.load_tokenizer(str(folder)), tmp_path / "saved")
    templates[1]["name"] = "../../../outside"
    change_config(folder, "tokenizer_config.json", chat_template=templates)
    with pytest.raises(UserError, match=r"named '\.\./\.\./\.\./outside'"):
        models.load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["bos_token", "a_setting_that_nobody_knows"])
def test_a_text_that_could_not_be_saved_is_told_at_the_start(tmp_path, name):
    sample_tokenizer(tmp_path / "model")
    change_config(tmp_path / "model", "tokenizer_config.json", **{name: "\ud83d"})
    with pytest.raises(UserError, match="surrogates not allowed"):
        models.load_tokenizer(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('x') }}",
                 "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ messages[9]['role'] }}", "{% include '/etc/passwd' %}", "{{ x"],
)  # fmt: skip
def test_a_chat_template_that_does_not_work_or_wants_out_is_told(tmp_path, template):
    sample_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    tokenizer = models.load_tokenizer(str(tmp_path / "model"))
    with pytest.raises(UserError, match="the chat template of"):
        prompts.check_shown(tokenizer, [prompts.planner_messages("How many?")])


def test_code_in_a_model_folder_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    """Without the setting, transformers would ask the user on the terminal, and run the file after a "y"."""
    folder = tmp_path / "model"
    sample_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}})
    )
    change_config(
        folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    args = TrainingArgs(base_model=str(folder), dataset="generated:shares", output_dir=str(tmp_path / "run"))
    loads = (
        lambda: models.load_base(str(folder), four_bit=False),
        lambda: models.load_tokenizer(str(folder)),
        lambda: check_run(args, {}, overwrite=False, resume=False),
    )
    for load in loads:
        with pytest.raises(UserError, match="could not be loaded"):
            load()
    assert not (tmp_path / "ran").exists()


class Pickled:
    """A class whose objects write a file when they are unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_code_in_a_model_folder_is_not_run(tmp_path, tiny_planner):
    folder = tmp_path / "model"
    shutil.copytree(tiny_planner, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Pickled(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        models.load_base(str(folder), four_bit=False)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_no_disk_can_have_and_a_card_without_end_are_told(tmp_path):
    from common.merging.model_card import read_card
    from common.runs.folder import settle_replaced

    with pytest.raises(UserError, match=r"--output-dir .* name another folder"):
        settle_replaced(tmp_path / ("o" * 300))
    card = tmp_path / "card.md"
    card.write_text("---\n" + "[" * 5000 + "\n---\n")
    with pytest.raises(UserError, match="not a valid model card"):
        read_card(card)
