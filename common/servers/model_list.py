"""The models that a server serves: find the base model and the planner, and check that they belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An entry of /v1/models.

    Attributes:
        name: on the server.
        parent: on vLLM, the base model of an adapter; None for a base model, and on servers that do not report it.
        root: on vLLM, the folder or Hub id of the weights.
    """

    name: str
    parent: str | None = None
    root: str | None = None


def base_model(
    served: Sequence[ServedModel], asked: str | None, *, flag: str, at: str = "--base-url", adapter: str = ""
) -> ServedModel:
    """The base model: the model with the given name, or without a name the only entry without a parent.

    Args:
        served: by the server.
        asked: its name, or None to detect it.
        flag, at: the flags that name it and its server, for errors.
        adapter: a name that is not the base model's. It is needed for servers that report no parents.

    Raises:
        UserError: if the model is not served or is an adapter, or if several models are possible.
    """
    names = ", ".join(model.name for model in served) or "nothing"
    if asked is not None:
        found = next((model for model in served if model.name == asked), None)
        if found is None:
            raise UserError(f"{flag} {asked} is not served there: {names}: name one of these")
        if found.parent is not None:
            raise UserError(f"{flag} {asked} is an adapter of {found.parent}, a base model is needed: {found.parent}?")
        return found
    bases = [model for model in served if model.parent is None and model.name != adapter]
    if not bases:
        raise UserError(
            f"the server of {at} serves no base model besides the planner, found {names}: start it with the base too, "
            f"or name another server with {at}"
        )
    if len(bases) != 1:
        # One model with several names has one root.
        roots = {model.root or model.name for model in bases}
        if len(roots) != 1:
            raise UserError(f"{flag} is needed, the server of {at} does not serve exactly one base model: {names}")
    return bases[0]


def adapter_of(served: Sequence[ServedModel], base: str) -> str | None:
    """Name of an adapter on the same server that might answer instead of the base model, or None."""
    return next((model.name for model in served if model.parent is not None and model.name != base), None)


def find_adapter(served: list[ServedModel], name: str) -> ServedModel:
    """The planner among the served models.

    Raises:
        UserError: if no model of this name is served.
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
    """Check that the adapter belongs to the base model in use.

    Raises:
        UserError: if the adapter is the base model itself, or belongs to another model.
    """
    if adapter.name == base.name:
        raise UserError(f"--lora-adapter {adapter.name} is the base model itself: name an adapter")
    if adapter.parent in (None, base.name):
        return  # other servers than vLLM report no parents
    parent = next((model for model in served if model.name == adapter.parent), None)
    if parent is None or parent.root is None or parent.root != base.root:  # one model may have several names
        raise UserError(
            f"--lora-adapter {adapter.name} is an adapter of {adapter.parent}, not of --model {base.name}: "
            f"use --model {adapter.parent}"
        )
