"""Exact values of rope in float64, and how far from them a backend may be.

The table is taken as it is stored. Each turn makes a product and a sum: 2 roundings of the dtype
that is computed in, of |a c| + |b s|. What a norm adds is as in testing.rms_norm_expected.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.testing import ROUNDOFF, Expected

WIDE = torch.float64
TURNED = 2


class Norm(NamedTuple):
    """The norm of one side before it is turned."""

    weight: Tensor
    eps: float
    style: str


def rope_expected(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    style: str,
    dy: Tensor,
    norm: Norm | None = None,
    truncating: bool = False,
) -> dict[str, Expected]:
    """y, dx and with a norm dweight, of one side x (T, H, D); dy is the gradient of y.

    `truncating`: the backend rounds bfloat16 towards zero, as Triton's interpreter does.
    """
    unit = ROUNDOFF[WIDE if x.dtype == WIDE else torch.float32]
    c, s, value, grad = (t.detach().cpu().to(WIDE) for t in (cos, sin, x, dy))
    g, g_size = _turned(grad, c, -s, style), _turned_size(grad, c, s, style)
    if norm is None:
        rotary = torch.arange(x.shape[-1]) < 2 * c.shape[1]
        y, size = _turned(value, c, s, style), _turned_size(value, c, s, style)
        return {
            name: Expected(exact, torch.where(rotary, stored + TURNED * unit * sizes, 0.0))
            for name, exact, sizes in (("y", y, size), ("dx", g, g_size))
            for stored in [_stored(exact, x.dtype, truncating)]
        }
    tokens, heads, width = x.shape
    arithmetic = unit * (8 + math.sqrt(width))
    weight = norm.weight.detach().cpu().to(WIDE)
    v = weight + (1.0 if norm.style == "gemma" else 0.0)
    v_size = weight.abs() + (1.0 if norm.style == "gemma" else 0.0)
    rstd = torch.rsqrt(value.square().mean(-1, keepdim=True) + norm.eps)
    n = value * rstd
    y, y_size = _turned(n * v, c, s, style), _turned_size(n.abs() * v_size, c, s, style)
    dx = rstd * (g * v - n * (g * v * n).mean(-1, keepdim=True))
    dx_size = g_size * v_size
    dx_size = rstd * (dx_size + n.abs() * (dx_size * n.abs()).mean(-1, keepdim=True))
    dweight, share = (g * n).sum((0, 1)), (g_size * n.abs()).sum((0, 1))
    relative = arithmetic + TURNED * unit
    summed = relative + unit * math.sqrt(tokens * heads)
    stored_weight = _stored(dweight, norm.weight.dtype, False)
    return {
        "y": Expected(y, _stored(y, x.dtype, truncating) + relative * y_size),
        "dx": Expected(dx, _stored(dx, x.dtype, truncating) + relative * dx_size),
        "dweight": Expected(dweight, stored_weight + summed * share),
    }


def _turned(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """Each pair as a complex number, times cos + i sin."""
    first, second = _places(cos, style)
    turned = torch.complex(x[..., first], x[..., second]) * torch.complex(cos, sin)[:, None]
    result = x.clone()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def _turned_size(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """The sizes of the two products, added; where nothing is turned |x|."""
    first, second = _places(cos, style)
    cos, sin = cos.abs()[:, None], sin.abs()[:, None]
    size = x.abs()
    a, b = size[..., first], size[..., second]
    size[..., first], size[..., second] = a * cos + b * sin, b * cos + a * sin
    return size


def _places(cos: Tensor, style: str) -> tuple[Tensor, Tensor]:
    pair = torch.arange(cos.shape[1])
    return (pair, pair + cos.shape[1]) if style == "half" else (2 * pair, 2 * pair + 1)


def _stored(value: Tensor, dtype: torch.dtype, truncating: bool) -> Tensor:
    """The rounding to `dtype`, below its normal numbers of a fixed size."""
    relative = ROUNDOFF[dtype] * (2 if truncating and dtype == torch.bfloat16 else 1)
    return relative * value.abs().clamp(min=torch.finfo(dtype).tiny)
