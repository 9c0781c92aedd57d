"""Exact values of gated linear units in float64, and how far from them a backend may be.

The formulas are written out here once more, so that no code is compared with itself. Errors are
followed through them to first order, in units of the roundoff of the dtype that is computed in
(float32; float64 for float64): of exp(x) 4 units of its value, and one more, and those of x, for
each unit of |x|; of a quotient 4; of erfc 12, and twice those of its argument, for each of its
square. Exponentials below the smallest normal number may become 0. Results in float64 are compared
with values whose own error is as large: twice the unit.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.testing import ROUNDOFF, Expected

WIDE = torch.float64


def glu_expected(
    gate: Tensor, up: Tensor, activation: str, dy: Tensor, *, truncating: bool = False
) -> dict[str, Expected]:
    """y, dgate and dup of activation(gate) * up, tensors of one shape and dtype, gates finite.

    `truncating`: the backend rounds bfloat16 towards zero, as Triton's interpreter does.
    """
    compute = WIDE if gate.dtype == WIDE else torch.float32
    unit, tiny = ROUNDOFF[compute] * (2 if compute == WIDE else 1), torch.finfo(compute).tiny
    stored = ROUNDOFF[gate.dtype] * (2 if truncating else 1)
    smallest = max(torch.finfo(gate.dtype).tiny * stored, tiny)
    g, u, upstream = (tensor.detach().cpu().to(WIDE) for tensor in (gate, up, dy))
    gating = _gelu(g, unit, tiny) if activation == "gelu" else _logistic(g, activation, unit, tiny)
    share, slope = gating.share.value, gating.slope.value
    curve = share + g * slope
    curve_error = gating.share.limit + g.abs() * (gating.slope.limit + unit * slope)
    curve_error = curve_error + unit * curve.abs()

    def product(value: Tensor, error: Tensor) -> Expected:
        """Of three factors: two roundings, one more when it is stored."""
        limit = error + (2 * unit + stored) * value.abs() + smallest
        return Expected(value, limit)

    def activated(factor: Tensor) -> Expected:
        lost = gating.share.limit * g.abs() + tiny  # where g * share itself is too small
        return product(factor * (g * share), factor.abs() * lost)

    factor = upstream * u
    return {
        "y": activated(u),
        "dgate": product(factor * curve, factor.abs() * curve_error),
        "dup": activated(upstream),
    }


class _Gating(NamedTuple):
    """The share of a gate that passes, and its derivative."""

    share: Expected
    slope: Expected


def _logistic(g: Tensor, activation: str, unit: float, tiny: float) -> _Gating:
    """share = 1 / (1 + exp(-x)); x = g, or 2 sqrt(2 / pi) (g + 0.044715 g^3) in 5 roundings."""
    silu = activation == "silu"
    root = 2 * math.sqrt(2 / math.pi)
    x = g if silu else root * (g + 0.044715 * g**3)
    inner = torch.ones_like(g) if silu else root * (1 + 3 * 0.044715 * g.square())
    share, other = torch.special.expit(x), torch.special.expit(-x)
    exponential = unit * (4 + (1 if silu else 6) * x.abs())
    share_error = share * (exponential * other + 6 * unit) + 2 * tiny
    slope = share * other * inner
    slope_error = slope * (exponential + 17 * unit) + 2 * tiny * inner
    return _Gating(Expected(share, share_error), Expected(slope, slope_error))


def _gelu(g: Tensor, unit: float, tiny: float) -> _Gating:
    """share: the normal distribution; slope: its density, of which the argument is rounded once."""
    half_square = g.square() / 2
    share = 0.5 * torch.special.erfc(-g / math.sqrt(2))
    tail = 0.5 * torch.special.erfc(g.abs() / math.sqrt(2))
    share_error = unit * ((12 + 4 * half_square) * tail + 4 * share) + 2 * tiny
    slope = torch.exp(-half_square) / math.sqrt(2 * math.pi)
    slope_error = slope * unit * (6 + 2 * half_square) + 2 * tiny
    return _Gating(Expected(share, share_error), Expected(slope, slope_error))
