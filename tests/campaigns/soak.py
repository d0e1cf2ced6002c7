"""Placeholder."""

from .stage import Stage


def campaign(stage: Stage, only: str = "") -> None: ...
