"""Parameter groups as torch's optimizers take them."""

from __future__ import annotations

from typing import Any

from fasttrain.core.interfaces import ParameterGroup


def named_groups(groups: list[ParameterGroup]) -> list[dict[str, Any]]:
    """One mapping for each group, with its name, its parameters by name, and its rates."""
    return [
        {
            "name": group.name,
            "params": list(zip(group.names, group.parameters, strict=True)),
            "lr": group.learning_rate,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
