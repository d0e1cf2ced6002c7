"""All settings of `merge_and_push.py`. Nothing heavy is imported here."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserErrors
from common.settings.fields import setting
from common.settings.grpo import TrainingArgs

# The Hub's rule (huggingface_hub.utils.validate_repo_id), copied because importing it takes half a second.
REPO_NAME = re.compile(
    r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_][\w.-]{0,95}(?<![.-])(?<!\.git)", re.ASCII
)


@dataclass(kw_only=True)
class MergeArgs:
    """Settings of a merge. The Hub token is not among them, because settings are printed and stored."""

    # fmt: off
    base_model: str | None = setting(None, "model", "Hub id or folder of the base model (default: the one the adapter names)", metavar="MODEL")
    revision: str | None = setting(None, "model", "branch, tag or commit of a base model on the Hub", metavar="REV")
    adapter_path: str = setting(TrainingArgs.output_dir, "model", "folder of the LoRA adapter", metavar="DIR")
    merge_base: Literal["auto", "bf16", "nf4"] = setting("auto", "model", "merge into the unquantised weights (bf16) or into the dequantised NF4 weights that a 4-bit adapter was trained on (nf4); auto: as it was trained")

    local_save_path: str | None = setting(None, "output", "folder for the merged model (default: beside the adapter, with -merged added to its name)", metavar="DIR")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "output", "number format of the merged weights; auto: that of the base model")
    max_shard_size: str = setting("5GB", "output", "largest weights file", metavar="SIZE")
    model_card: str | None = setting(None, "output", "a model card to use instead of the generated one; missing metadata is added to it", metavar="FILE")
    overwrite: bool = setting(False, "output", "replace the merged model in --local-save-path")

    repo_name: str = setting(MISSING, "hub", "Hub repo, user/name (required); when pushing, a name alone is one of the token's user", metavar="NAME")
    push: bool = setting(True, "hub", "push to the Hub")
    private: bool = setting(False, "hub", "create the repo as a private one")
    # fmt: on

    @property
    def target(self) -> Path:
        """The folder of the merged model."""
        if self.local_save_path is not None:
            return Path(self.local_save_path)
        adapter = Path(self.adapter_path).resolve()
        return adapter.with_name(f"{adapter.name}-merged")

    def validate(self) -> None:
        """Check every value.

        Raises:
            UserErrors: with all problems found, one line each.
        """
        problems = []
        if not REPO_NAME.fullmatch(self.repo_name):
            problems.append(
                f"--repo-name {self.repo_name} is no Hub repo: user/name, of letters, digits, '-', '_' and '.' only"
            )
        elif "/" not in self.repo_name and not self.push:
            problems.append(
                f"--repo-name {self.repo_name} has no owner, which only the Hub's login could add: with --no-push give "
                "it as user/name"
            )
        if self.private and not self.push:
            problems.append("--private is of the Hub's repo, and --no-push makes none: leave one of them out")
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMG]i?B", self.max_shard_size):
            problems.append(f"--max-shard-size must be a size such as 500MB or 5GB, found {self.max_shard_size}")
        if problems:
            raise UserErrors(problems)
