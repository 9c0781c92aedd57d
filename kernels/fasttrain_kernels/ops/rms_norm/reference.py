"""RMS normalisation, the definition: plain PyTorch, float32 inside (float64 for float64 inputs).

Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019), https://arxiv.org/abs/1910.07467

Forward, per row x of width H, where s = x, or s = x + residual rounded to the promoted dtype:
    rstd = 1 / sqrt(mean(s^2) + eps)
    n    = s * rstd
    y    = cast(n) * w      style "llama": n is rounded to s's dtype, then the product to y's
           cast(n * w)      style "olmo2": one rounding, to s's dtype
           cast(n * (1+w))  style "gemma": the same, with weights stored as their distance from 1
Backward, with v = w (gemma: 1 + w), g = dy * v, and dsum the gradient that reaches s beside y:
    ds = rstd * (g - n * mean(g * n)) + dsum        (for x and residual alike)
    dw = sum over rows of dy * n

The dtype of y is what transformers' modules of these styles return: s's dtype, but for "llama"
promoted with the weight's (bfloat16 activations times float32 weights give float32).
"""

from typing import NamedTuple

import torch
from torch import Tensor

STYLES = ("llama", "gemma", "olmo2")


class Problem(NamedTuple):
    """The facts that decide which backend can serve a call."""

    device: torch.device
    dtype: torch.dtype
    width: int
    weight_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    style: str
    rows: int = 0  # a power of two


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and products are formed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_dtype(dtype: torch.dtype, residual_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of s."""
    return dtype if residual_dtype is None else torch.promote_types(dtype, residual_dtype)


def output_dtype(
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype,
    style: str,
) -> torch.dtype:
    """The dtype of y."""
    summed = sum_dtype(dtype, residual_dtype)
    return torch.promote_types(summed, weight_dtype) if style == "llama" else summed


def scale(weight: Tensor, style: str, dtype: torch.dtype) -> Tensor:
    """v: what n is multiplied by, in `dtype`."""
    return weight.to(dtype) + 1 if style == "gemma" else weight.to(dtype)


def forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, style: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual (N, H), weight (H,) -> y (N, H), s (N, H; empty without residual), rstd (N,)."""
    total = x if residual is None else x + residual
    wide = total.to(compute_dtype(total.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    normalized = wide * rstd[:, None]
    if style == "llama":
        y = normalized.to(total.dtype) * weight
    else:
        y = (normalized * scale(weight, style, wide.dtype)).to(total.dtype)
    return y, x.new_empty(0) if residual is None else total, rstd


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    style: str,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dy, dsum, s = x (N, H), rstd (N,) -> ds (N, H), dw (H,); what isn't needed is empty."""
    wide = compute_dtype(x.dtype)
    normalized = x.to(wide) * rstd[:, None]
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if needs_dx:
        grad = dy.to(wide) * scale(weight, style, wide)
        dot = (grad * normalized).mean(-1, keepdim=True)
        dx = (grad - normalized * dot) * rstd[:, None]
        dx = (dx if dsum is None else dx + dsum.to(wide)).to(x.dtype)
    if needs_dweight:
        dweight = (dy.to(wide) * normalized).sum(0).to(weight.dtype)
    return dx, dweight
