"""Gated linear units' product activation(gate) * up, from its definition, in PyTorch.

float32 inside (float64 for float64), and one rounding, at the end. transformers' modules make two:
they round activation(gate) to the input's dtype before the product.

Shazeer, "GLU Variants Improve Transformer" (2020), https://arxiv.org/abs/2002.05202

Forward, of each element, g of gate and u of up:
    y = a(g) * u,  a(g) = g * p(g)
    "silu"       p(g) = 1 / (1 + exp(-g))
    "gelu_tanh"  p(g) = (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))) / 2
    "gelu"       p(g) = (1 + erf(g / sqrt(2))) / 2
Backward:
    dgate = dy * u * (p(g) + g * p'(g))
    dup   = dy * a(g)

p is computed so that it keeps its relative precision where it goes to 0: (1 + tanh(a)) / 2 as the
logistic function of 2a, (1 + erf(a)) / 2 as erfc(-a) / 2. At infinite gates a and a' are their
limits: a(-inf) = a'(-inf) = 0, a'(inf) = 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
# From here on p is 0 or 1, and p' is 0, in every dtype: clipping gates to it keeps inf * 0 away.
SATURATED = 1000.0
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR


class Problem(NamedTuple):
    """The facts that decide which backend can serve a call."""

    device: torch.device
    dtype: torch.dtype
    activation: str = "silu"  # "silu", "gelu" or "gelu_tanh"
    width: int = 0
    rows: int = 0  # a power of two


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that everything is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def share_and_slope(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """p(g) and p'(g)."""
    if activation == "gelu":
        gaussian = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-gate / math.sqrt(2)), gaussian
    silu = activation == "silu"
    argument = gate if silu else gate * (LINEAR + CUBIC * gate.square())
    share = torch.sigmoid(argument)
    slope = share * torch.sigmoid(-argument)
    return share, slope if silu else slope * (LINEAR + 3 * CUBIC * gate.square())


def forward(gate: Tensor, up: Tensor, activation: str, y: Tensor) -> None:
    """gate, up (N, I), rows apart as they please -> y (N, I), which is written."""
    wide = compute_dtype(gate.dtype)
    g = gate.to(wide).clamp(min=-SATURATED)
    share, _ = share_and_slope(g.clamp(max=SATURATED), activation)
    y.copy_(g * share * up.to(wide))


def backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dgate: Tensor | None,
    dup: Tensor | None,
) -> None:
    """dy, gate, up (N, I) -> dgate, dup (N, I), which are written; None: not wanted."""
    wide = compute_dtype(gate.dtype)
    g = gate.to(wide).clamp(min=-SATURATED)
    within = g.clamp(max=SATURATED)
    share, slope = share_and_slope(within, activation)
    if dgate is not None:
        dgate.copy_(dy.to(wide) * up.to(wide) * (share + within * slope))
    if dup is not None:
        dup.copy_(dy.to(wide) * (g * share))
