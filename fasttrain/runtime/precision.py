"""In what dtype weights live and arithmetic runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

PrecisionName = Literal["fp32", "bf16-mixed", "bf16"]


@dataclass(frozen=True)
class Precision:
    """The chosen precision, and why."""

    name: PrecisionName
    parameters: torch.dtype
    autocast: torch.dtype | None
    reason: str

    @property
    def activations(self) -> torch.dtype:
        return self.autocast or self.parameters


def choose_precision(
    requested: Literal["auto", "fp32", "bf16-mixed", "bf16"], device: torch.device
) -> Precision:
    """Resolve `precision:` for a device.

    `auto` is bf16-mixed where the GPU has bf16 and fp32 elsewhere: on a CPU without bf16 matrix
    instructions a bf16 matmul takes 2 to 4.5 times as long as an fp32 one.
    """
    if requested != "auto":
        return _named(requested, "asked for")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return _named("bf16-mixed", "auto: the GPU has bf16; the weights stay fp32")
    if device.type == "cuda":
        return _named("fp32", "auto: the GPU has no bf16")
    return _named("fp32", "auto: on a CPU")


def _named(name: PrecisionName, reason: str) -> Precision:
    parameters = torch.bfloat16 if name == "bf16" else torch.float32
    autocast = torch.bfloat16 if name == "bf16-mixed" else None
    return Precision(name=name, parameters=parameters, autocast=autocast, reason=reason)
