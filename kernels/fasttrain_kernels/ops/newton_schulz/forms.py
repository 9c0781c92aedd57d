"""Two orders of products that come to the same: the direct form and the Gram form.

X is n by m, n <= m. Of X X^T and of all polynomials in it one triangle is enough, for they are
symmetric, and commute. In units of n^3 FLOP, with m = r n, and five steps:
    direct   X <- a X + (b A + c A A) X, A = X X^T                  15 r +  5   (20 r + 10 of whole)
    Gram     R = X X^T once; P = a I + b R + c R R, Q <- Q P,        6 r + 14
             R <- P R P in each step; X <- Q X once
so that the Gram form saves a quarter at r = 2 and 41 % at r = 4 (Gram Newton-Schulz, Dao-AILab, 2026:
dao-lab.ai/blog/2026/gram-newton-schulz).

What R has lost in rounding grows with it: a direction of X that is 1e-3 of the largest is 1e-6 of
R, below what 16 bits hold, and each step makes it 12 times as large (a^2). So the Gram form begins
anew with X after few steps, which the count above includes. And R, P and Q have to be symmetric to
the last bit: with both triangles rounded by themselves, 64 by 64 elements in float32 were off by
3e-4 instead of 8e-7.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fasttrain_kernels.ops.newton_schulz.reference import Coefficients

FIRST, NEXT = 2, 3  # steps before R is made anew: the first, when X has the smallest directions


class Symmetric(Protocol):
    """out = scale left right^T + times plus + diagonal I, which the caller knows to be symmetric.

    left, right (B, n, k); plus, out (B, n, n) contiguous; out is none of the others. One triangle of
    out is the other's mirror image, to the last bit.
    """

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        out: Tensor,
        *,
        scale: float = 1.0,
        plus: Tensor | None = None,
        times: float = 0.0,
        diagonal: float = 0.0,
    ) -> None: ...


class Wide(Protocol):
    """out = square x + times x; square (B, n, n), x, out (B, n, m)."""

    def __call__(self, square: Tensor, x: Tensor, out: Tensor, *, times: float = 0.0) -> None: ...


class Products(NamedTuple):
    symmetric: Symmetric
    wide: Wide


def library_wide(square: Tensor, x: Tensor, out: Tensor, *, times: float = 0.0) -> None:
    """By the device's own library, which adds `times x` within the product."""
    torch.baddbmm(x, square, x, beta=times, out=out)


def iterate(
    x: Tensor, steps: int, coefficients: Coefficients, method: str, products: Products
) -> Tensor:
    """x (B, m, n), divided by its norms, contiguous -> (B, m, n) contiguous. Overwrites x."""
    is_tall = x.shape[1] > x.shape[2]
    spare = torch.empty_like(x)
    wide, other = (x.mT, spare.mT) if is_tall else (x, spare)
    form = gram if method == "gram" else direct
    result = form(wide, other, steps, coefficients, products)
    return result.mT if is_tall else result


def direct(
    x: Tensor, spare: Tensor, steps: int, coefficients: Coefficients, products: Products
) -> Tensor:
    """x, spare (B, n, m), both overwritten; the result is one of them."""
    a, b, c = coefficients
    gram_matrix, update = (_square(x) for _ in range(2))
    for _ in range(steps):
        products.symmetric(x, x, gram_matrix)
        products.symmetric(gram_matrix, gram_matrix, update, scale=c, plus=gram_matrix, times=b)
        products.wide(update, x, spare, times=a)
        x, spare = spare, x
    return x


def gram(
    x: Tensor, spare: Tensor, steps: int, coefficients: Coefficients, products: Products
) -> Tensor:
    """As direct."""
    squares = [_square(x) for _ in range(4)]
    for count in runs(steps):
        products.wide(_polynomial(x, count, coefficients, products, squares), x, spare)
        x, spare = spare, x
    return x


def runs(steps: int) -> Iterator[int]:
    """How many steps are made of one R, in their order."""
    count = FIRST
    while steps > 0:
        yield min(count, steps)
        steps -= count
        count = NEXT


def _polynomial(
    x: Tensor, count: int, coefficients: Coefficients, products: Products, squares: list[Tensor]
) -> Tensor:
    """Q, so that `count` steps bring x to Q x; it is one of `squares`."""
    a, b, c = coefficients
    r, p, q, other = squares
    products.symmetric(x, x, r)
    for step in range(count):
        products.symmetric(r, r, p, scale=c, plus=r, times=b, diagonal=a)
        if step < count - 1:
            products.symmetric(r, p, other)
            products.symmetric(other, p, r)
        if step == 0:
            p, q = q, p
        else:
            products.symmetric(q, p, other)
            q, other = other, q
    return q


def _square(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])
