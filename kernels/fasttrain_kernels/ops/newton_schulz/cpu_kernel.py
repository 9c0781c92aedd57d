"""Newton-Schulz on CPUs: batched products of the BLAS, in float32 (float64 for float64).

Products that are symmetric are formed in panels of rows up to the diagonal, and mirrored: 0.63 of
the arithmetic for four panels, and 0.67 of the time on one core of an EPYC. 16 bits are multiplied in
float32, for few CPUs have products of theirs.
"""

import torch
from torch import Tensor

from fasttrain_kernels.ops.newton_schulz import reference
from fasttrain_kernels.ops.newton_schulz.forms import Products, iterate, library_wide
from fasttrain_kernels.ops.newton_schulz.reference import Coefficients, Problem

PANEL = 256  # rows: with fewer, what panels save in arithmetic they lose in speed

iterates = reference.iterates


def unsupported(problem: Problem) -> str | None:
    """The reason why this can't serve `problem`, or None."""
    if problem.device.type != "cpu":
        return f"runs on CPUs; the tensors are on {problem.device.type}"
    return None


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
    """As forms.Symmetric. A product of a matrix with itself is symmetric as the BLAS forms it."""
    rows = left.shape[1]
    panels = max(1, rows // PANEL)
    height = -(-rows // panels)
    for begin in range(0, rows, height):
        end = min(begin + height, rows)
        panel = out[:, begin:end, :end]
        before = panel if plus is None else plus[:, begin:end, :end]
        part = left[:, begin:end], right[:, :end].mT
        torch.baddbmm(before, *part, beta=times, alpha=scale, out=panel)
        out[:, :begin, begin:end] = panel[:, :, :begin].mT
        if left is not right:
            block = panel[:, :, begin:]
            below = torch.ones(block.shape[1:], dtype=torch.bool).tril()
            block.copy_(torch.where(below, block, block.mT))
    if diagonal:
        out.diagonal(dim1=1, dim2=2).add_(diagonal)


PRODUCTS = Products(symmetric, library_wide)


def forward(matrices: Tensor, steps: int, coefficients: Coefficients, method: str) -> Tensor:
    """As reference.forward."""
    x = torch.empty(matrices.shape, dtype=iterates(matrices.dtype))
    torch.div(matrices, reference.norms(matrices), out=x)
    return iterate(x, steps, coefficients, method, PRODUCTS).to(matrices.dtype)
