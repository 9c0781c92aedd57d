"""The numbers of an optimizer's groups, on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain_kernels.ops.optimizer_step.step import Numbers
from fasttrain_kernels.ops.optimizer_step.table import on_device


class GroupNumbers:
    """Sent to a device when they change; learning rates that are tensors stay on theirs."""

    def __init__(self) -> None:
        self._sent: dict[torch.device, tuple[list[tuple[float, ...]], Tensor]] = {}

    def on(self, device: torch.device, numbers: Sequence[Numbers]) -> Tensor:
        """(groups, 7) float64."""
        plain = [tuple(0.0 if isinstance(n, Tensor) else float(n) for n in row) for row in numbers]
        known = self._sent.get(device)
        if known is None or known[0] != plain:
            values = torch.tensor(plain, dtype=torch.float64)
            known = self._sent[device] = (plain, on_device(values, device))
        table = known[1]
        for index, row in enumerate(numbers):
            for column, value in enumerate(row):
                if isinstance(value, Tensor):
                    table[index, column].copy_(value.detach().reshape(()))
        return table
