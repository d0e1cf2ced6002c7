"""The layout: which part of common/ may import which, which modules stay light, and limits for folders and files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HEAVY, ROOT

COMMON = ROOT / "common"

# A part is a folder of common/ or a module directly in it. Each part may import only the parts that its entry names. An
# entry names only parts that come earlier in this table.
MAY_IMPORT = {
    "errors": "",
    "processes": "errors",
    "plans": "",
    "generation": "",
    "decoding": "processes",
    "grading": "plans",
    "settings": "errors plans processes",
    "cli": "errors processes settings",
    "problems": "errors processes plans grading settings cli",
    "examples": "problems",
    "prompts": "errors examples grading problems",
    "models": "errors decoding settings prompts",
    "runs": "errors processes settings cli models",
    "reports": "errors settings runs",
    "similarity": "models",
    "servers": "errors processes generation settings cli prompts models runs",
    "workers": "errors processes generation decoding settings cli prompts runs servers",
    "fit": "errors processes settings cli problems prompts models decoding runs reports servers workers",
    "pipeline": "plans generation grading settings prompts models decoding similarity workers",
    "rewards": "errors processes plans generation settings problems reports pipeline",
    "merging": "errors settings cli prompts models runs reports decoding workers",
    "evaluation": (
        "processes plans generation grading settings cli problems prompts models runs reports similarity workers "
        "pipeline"
    ),
    "inference": (
        "errors plans generation grading settings cli problems prompts models runs reports similarity servers workers "
        "pipeline evaluation"
    ),
    "training": (
        "errors processes decoding settings cli problems prompts models runs reports similarity servers workers fit "
        "pipeline rewards evaluation"
    ),
}
# All other modules import torch, transformers and the like only when they use them. So `--help` and the message for a
# wrong flag appear immediately.
HEAVY_MODULES = {
    "decoding.blocks",
    "decoding.branching",
    "decoding.decode",
    "decoding.log_probs",
    "decoding.packing",
    "merging.job",
    "merging.merge",
    "reports.wandb_log",
    *(f"training.{name}" for name in ("callbacks", "device", "grpo", "progress", "records", "sft", "trainer")),
}


def modules() -> dict[str, Path]:
    """Every module of common/ by its name within it, such as `training.grpo`."""
    found = sorted(path for path in COMMON.rglob("*.py") if path.stem != "__init__")
    return {".".join(path.relative_to(COMMON).with_suffix("").parts): path for path in found}


def imported_parts(path: Path) -> set[str]:
    """Parts of common/ that a module imports, at its top or inside a function."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            parts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("common."):
            parts.add(node.module.split(".")[1])
    return parts


def test_imports_go_one_way():
    order = list(MAY_IMPORT)
    for part, allowed in MAY_IMPORT.items():
        for name in allowed.split():
            assert order.index(name) < order.index(part), f"the table lets {part} import {name}, which stands below it"
    used: dict[str, set[str]] = {part: set() for part in MAY_IMPORT}
    for name, path in modules().items():
        part = name.split(".")[0]
        assert part in MAY_IMPORT, f"common/{part} has no place in the table"
        used[part] |= imported_parts(path) - {part}
        surplus = imported_parts(path) - {part, *MAY_IMPORT[part].split()}
        assert not surplus, f"{path.relative_to(ROOT)} imports {', '.join(surplus)}, which the table does not allow"
    unused = {part: set(allowed.split()) - used[part] for part, allowed in MAY_IMPORT.items()}
    assert not any(unused.values()), f"allowed but not used: {unused}"


def test_the_documented_table_is_this_one():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for part, allowed in MAY_IMPORT.items():
        row = f"| `{part}` | {', '.join(allowed.split()) or '-'} |"
        assert row in page, f"docs/architecture.md lacks the row {row}"


@pytest.mark.parametrize("heavy", [False, True])
def test_light_modules_import_nothing_heavy(heavy):
    names = [f"common.{name}" for name in modules() if (name in HEAVY_MODULES) == heavy]
    code = (
        f"import sys, importlib\n[importlib.import_module(name) for name in {names}]\n"
        f"print(*({{name.split('.')[0] for name in sys.modules}} & {HEAVY}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bool(done.stdout.split()) == heavy, f"{done.stdout} imported by {names}"


def test_no_folder_and_no_file_outgrows_a_reader():
    top = [name for name in modules() if "." not in name]
    assert len(top) <= 10, f"{len(top)} modules directly in common/: {top}"
    for folder in {path.parent for path in modules().values()} - {COMMON}:
        files = [path.name for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(files) <= 7, f"{folder.relative_to(ROOT)} holds {len(files)} modules: {sorted(files)}"
    limits = [(ROOT / "tests", 400), (COMMON, 400), (ROOT, 200)]
    for folder, limit in limits:
        for path in folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines, {limit} are the most"


def test_tests_stand_in_the_folder_of_what_they_test():
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert folders <= {*(path.name for path in COMMON.iterdir() if path.is_dir()), "campaigns"}


def test_private_names_of_trl_are_used_in_one_module_only():
    for name, path in modules().items():
        if name != "training.trainer":
            for node in ast.walk(ast.parse(path.read_text())):
                foreign = isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("super()", "trl_utils")
                assert not (foreign and node.attr.startswith("_") and not node.attr.startswith("__")), (
                    f"{path.relative_to(ROOT)}:{node.lineno} uses {ast.unparse(node)}"
                )
