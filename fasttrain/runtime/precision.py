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
    masters: bool = False  # whether the optimizer keeps fp32 copies of 16-bit parameters

    @property
    def activations(self) -> torch.dtype:
        return self.autocast or self.parameters


def choose_precision(
    requested: Literal["auto", "fp32", "bf16-mixed", "bf16"],
    device: torch.device,
    *,
    optimizer_keeps_masters: bool = False,
) -> Precision:
    """Resolve `precision:` for a device.

    `auto` is bf16-mixed where the GPU has bf16 and fp32 elsewhere: on a CPU without bf16 matrix
    instructions a bf16 matmul takes 2 to 4.5 times as long as an fp32 one. fp32 weights have one
    owner: with bf16-mixed the optimizer, where it can keep them, else the model.
    """
    if requested != "auto":
        return _named(requested, "asked for", optimizer_keeps_masters)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return _named("bf16-mixed", "auto: the GPU has bf16", optimizer_keeps_masters)
    why = "the GPU has no bf16" if device.type == "cuda" else "on a CPU"
    return _named("fp32", f"auto: {why}", optimizer_keeps_masters)


def _named(name: PrecisionName, reason: str, keeps_masters: bool) -> Precision:
    if name == "fp32":
        return Precision(name, torch.float32, None, reason)
    if name == "bf16":
        return Precision(name, torch.bfloat16, None, reason)
    if keeps_masters:
        reason += "; weights in bf16, their fp32 masters in the optimizer"
        return Precision(name, torch.bfloat16, torch.bfloat16, reason, masters=True)
    reason += "; weights in fp32, of which this optimizer keeps no masters"
    return Precision(name, torch.float32, torch.bfloat16, reason)
