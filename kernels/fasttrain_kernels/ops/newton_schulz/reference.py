"""Newton-Schulz iterations towards the nearest orthogonal matrix, the definition: plain PyTorch.

For each matrix M with no more rows than columns (of others, the transpose):
    X = M / max(norm(M), EPS)                          Frobenius norm
    steps times:  A = X X^T;  X = a X + (b A + c A A) X
formed in float32 (float64 for float64) and rounded once. Each step maps every singular value s to
a s + b s^3 + c s^5. With the coefficients of Keller Jordan's Muon (kellerjordan.github.io/posts/muon,
2024) five steps bring those above 0.002 to between 0.68 and 1.21, and not to 1: what they give up
there, they gain in speed near 0. "Muon is Scalable for LLM Training" (arXiv 2502.16982) uses them
too. A matrix of zeros stays zeros; NaN and inf stay in their matrix.

A backend may get there through "gram" (forms.py) instead; the definition knows the direct way only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


class Problem(NamedTuple):
    """The facts that decide which backend can serve a call."""

    device: torch.device
    dtype: torch.dtype
    method: str  # "direct" or "gram"
    short: int = 0  # rows or columns, whatever there are fewer of
    long: int = 0
    rows: int = 0  # matrices; a power of two


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


def iterates(dtype: torch.dtype) -> torch.dtype:
    """The dtype that X is kept in between steps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norms(matrices: Tensor) -> Tensor:
    """(B, m, n) -> (B, 1, 1): what each is divided by, in float32 (float64 for float64)."""
    wide = iterates(matrices.dtype)
    return torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=wide).clamp(min=EPS)


def forward(matrices: Tensor, steps: int, coefficients: Coefficients, method: str) -> Tensor:
    """matrices (B, m, n) -> (B, m, n) of their dtype."""
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(iterates(matrices.dtype)) / norms(matrices)
    x = x.mT if is_tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x.mT if is_tall else x
    return x.to(matrices.dtype).contiguous()
