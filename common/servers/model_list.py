"""What a server serves: which of its models is the base, which the planner, and whether they belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An entry of /v1/models. On vLLM an adapter has its base as `parent`, and `root` is where its files lie."""

    name: str
    parent: str | None = None
    root: str | None = None


def base_model(served: Sequence[ServedModel], asked: str | None, *, flag: str, adapter: str = "") -> ServedModel:
    """The model to use as base: the one asked for, else the one entry without a parent.

    Args:
        served: by the server.
        asked: its name, or None to detect it.
        flag: that names it, for errors.
        adapter: a name that is not the base's, on servers that tell no parents.

    Raises:
        UserError: when it is not served, is an adapter, or cannot be told from others.
    """
    names = ", ".join(model.name for model in served) or "nothing"
    if asked is not None:
        found = next((model for model in served if model.name == asked), None)
        if found is None:
            raise UserError(f"{flag} {asked} is not served there: {names}")
        if found.parent is not None:
            raise UserError(f"{flag} {asked} is an adapter of {found.parent}, a base model is needed: {found.parent}?")
        return found
    bases = [model for model in served if model.parent is None and model.name != adapter]
    if not bases:
        raise UserError(f"the server serves no base model besides the planner, found {names}: start it with the base")
    if len(bases) != 1:
        # One model under several names has one root.
        roots = {model.root or model.name for model in bases}
        if len(roots) != 1:
            raise UserError(f"{flag} is needed, the server does not serve exactly one base model: {names}")
    return bases[0]


def adapter_of(served: Sequence[ServedModel], base: str) -> str | None:
    """The name of an adapter that the same server serves and that could answer in the base's place."""
    return next((model.name for model in served if model.parent is not None and model.name != base), None)


def find_adapter(served: list[ServedModel], name: str) -> ServedModel:
    """The planner among the served models.

    Raises:
        UserError: when it is not among them, or is no adapter.
    """
    found = next((model for model in served if model.name == name), None)
    names = ", ".join(model.name for model in served) or "nothing"
    if found is None:
        raise UserError(
            f"--lora-adapter {name} is not served, found {names}: start the server with --enable-lora "
            f"--lora-modules {name}=FOLDER, or name another"
        )
    return found


def check_parent(served: list[ServedModel], adapter: ServedModel, base: ServedModel) -> None:
    """Stop when the adapter belongs to another model than the one in use.

    Raises:
        UserError: with both names.
    """
    if adapter.name == base.name:
        raise UserError(f"--lora-adapter {adapter.name} is the base model itself: name an adapter")
    if adapter.parent in (None, base.name):
        return  # other servers tell no parents
    parent = next((model for model in served if model.name == adapter.parent), None)
    if parent is None or parent.root is None or parent.root != base.root:  # one model may have several names
        raise UserError(
            f"--lora-adapter {adapter.name} is an adapter of {adapter.parent}, not of --model {base.name}: "
            f"use --model {adapter.parent}"
        )
