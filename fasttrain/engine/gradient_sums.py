"""Sums of 16-bit gradients over the micro-batches of a step, in float32.

In bf16 each addition would round the sum to 8 bits, and the split into micro-batches would count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GradientSums:
    """Keeps `main_grad`, which optimizers with masters read, where micro-batches are several.

    The sums stay from step to step: 4 bytes for each 16-bit parameter, none where a step is one
    micro-batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._adding = False
        self._sums: dict[Tensor, Tensor] = {}
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.register_post_accumulate_grad_hook(self._add)

    def begin(self, micro_batches: int) -> None:
        """Before the micro-batches of a step."""
        self._adding = micro_batches > 1

    def end(self) -> None:
        """After the step."""
        for parameter in self._sums:
            parameter.main_grad = None  # type: ignore[attr-defined]

    def _add(self, parameter: Tensor) -> None:
        if not self._adding or parameter.grad is None:
            return
        if getattr(parameter, "main_grad", None) is not None:
            parameter.main_grad += parameter.grad  # type: ignore[attr-defined]
        else:
            if parameter not in self._sums:
                self._sums[parameter] = torch.empty_like(parameter, dtype=torch.float32)
            parameter.main_grad = self._sums[parameter].copy_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None
