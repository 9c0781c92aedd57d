"""Exact values of newton_schulz in float64, and how far from them a backend may be.

Steps magnify what is lost before them, small singular values by as much as 3.4 each. So the limit
is not a formula: the same products are made in float64 and each result is off by its roundings, up
or down at random by as much as one can be: of every number that is stored, and of the terms of sums
in float32. What comes of it, root mean square of a matrix and of several draws, is the size of an
error. Most of it lies along the vectors of one small singular value, so that an element's is like a
product of two normal numbers, of which the largest of 100000 is 11 times the usual: SPREAD.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fasttrain_kernels.ops.newton_schulz import reference
from fasttrain_kernels.ops.newton_schulz.forms import Products, iterate
from fasttrain_kernels.ops.newton_schulz.reference import Coefficients
from fasttrain_kernels.testing import ROUNDOFF, Expected

SPREAD = 12
DRAWS = 8


def newton_schulz_expected(
    matrices: Tensor,
    steps: int,
    coefficients: Coefficients,
    method: str,
    stored: torch.dtype,
    truncating: bool = False,
) -> Expected:
    """For matrices (B, m, n) with numbers that are finite.

    stored: the dtype that a backend keeps between steps. truncating: it rounds bfloat16 towards
    zero, as Triton's interpreter does.
    """
    exact = matrices.detach().cpu().double()
    value = reference.forward(exact, steps, coefficients, "direct")

    def off_by(round_: Callable[..., Tensor]) -> Tensor:
        products = _products(round_)
        x = round_(exact / reference.norms(exact), 0.0)
        return iterate(x, steps, coefficients, method, products)

    compute = ROUNDOFF[torch.float64 if stored == torch.float64 else torch.float32]
    clean = off_by(lambda value, size: value.clone())
    squares = torch.zeros(len(exact), 1, 1, dtype=torch.float64)
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        error = off_by(_rounding(stored, compute, generator)) - clean
        squares += error.square().mean((1, 2), keepdim=True) / DRAWS
    narrow = ROUNDOFF[matrices.dtype] * (2 if truncating else 1)
    return Expected(value, SPREAD * squares.sqrt() + narrow * value.abs())


def _rounding(
    stored: torch.dtype, compute: float, generator: torch.Generator
) -> Callable[..., Tensor]:
    """A function that moves numbers by their roundings: of `value`, and of sums of terms whose
    sizes are `size` in all."""
    least = torch.finfo(stored).smallest_normal * ROUNDOFF[stored]

    def moved(value: Tensor, size: Tensor | float) -> Tensor:
        sign = torch.rand(value.shape, generator=generator, dtype=torch.float64).sub(0.5).sign()
        stored_off = (ROUNDOFF[stored] * value.abs()).clamp(min=least)
        return value + sign * torch.where(value == 0, 0.0, stored_off + compute * size)

    return moved


def _products(round_: Callable[..., Tensor]) -> Products:
    """The products of forms.py in float64, their results rounded by `round_(value, size)`."""

    def symmetric(
        left: Tensor,
        right: Tensor,
        out: Tensor,
        *,
        scale: float = 1.0,
        plus: Tensor | None = None,
        times: float = 0.0,
        diagonal: float = 0.0,
    ) -> None:
        value = scale * (left @ right.mT)
        size = abs(scale) * (left.abs() @ right.abs().mT)
        if plus is not None:
            value, size = value + times * plus, size + abs(times) * plus.abs()
        value.diagonal(dim1=1, dim2=2).add_(diagonal)
        lower = round_(value, size).tril()
        out.copy_(lower + lower.tril(-1).mT)

    def wide(square: Tensor, x: Tensor, out: Tensor, *, times: float = 0.0) -> None:
        size = square.abs() @ x.abs() + abs(times) * x.abs()
        out.copy_(round_(square @ x + times * x, size))

    return Products(symmetric, wide)
