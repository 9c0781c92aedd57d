from __future__ import annotations

from fasttrain.config.errors import Problem
from fasttrain.config.schema.root import TrainConfig


def check(config: TrainConfig, *, name: str, problems: list[Problem]) -> list[Problem]:
    return []


def notes(config: TrainConfig) -> list[tuple[str, str]]:
    return []
