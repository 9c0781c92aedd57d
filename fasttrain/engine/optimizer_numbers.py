"""What of an optimizer's state is numbers, for a checkpoint: tensors go another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_OF_THE_SCHEDULE = ("lr", "initial_lr")


class OptimizerNumbers:
    """The numbers that steps change in an optimizer's groups, and those it keeps by parameter.

    Made before the first step. Schedule-free AdamW counts in its groups, bitsandbytes counts steps
    for each parameter. What the config gives (decay, betas) doesn't change in steps, so it stays
    the config's when a run goes on.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._start = [_numbers(group) for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """{"groups": a mapping for each group, "parameters": by <parameter name>/<state name>}."""
        groups = [
            {key: value for key, value in _numbers(group).items() if value != start.get(key)}
            for group, start in zip(self._optimizer.param_groups, self._start, strict=True)
        ]
        parameters = {
            f"{name}/{key}": value
            for name, parameter in self._model.named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if not isinstance(value, Tensor)
        }
        return {"groups": groups, "parameters": parameters}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse. ValueError where the groups are others."""
        groups = self._optimizer.param_groups
        if any(saved["groups"]) and len(saved["groups"]) != len(groups):
            raise ValueError(
                f"the checkpoint has {len(saved['groups'])} parameter groups, the run {len(groups)}"
            )
        for group, numbers in zip(groups, saved["groups"], strict=False):
            group.update(numbers)
        parameters = dict(self._model.named_parameters())
        for key, value in saved["parameters"].items():
            name, _, state_name = key.rpartition("/")
            self._optimizer.state[parameters[name]][state_name] = value


def _numbers(group: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in group.items()
        if isinstance(value, (int, float)) and key not in _OF_THE_SCHEDULE
    }
