"""Rotary position embedding, the definition: plain PyTorch, float32 inside (float64 for float64).

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021),
https://arxiv.org/abs/2104.09864

Per head x of D elements, of which the first R are rotated in R/2 pairs (a, b), with the token's
row of the table c = cos, s = sin:
    a' = a * c - b * s
    b' = b * c + a * s
    style "half":         pair i is elements i and i + R/2 (Llama)
    style "interleaved":  pair i is elements 2i and 2i + 1 (GPT-J, Cohere)
Elements from R on stay as they are, bit for bit. With norm weights, x is first an RMS norm of the
head, n * v, where as in ops/rms_norm
    n = x / sqrt(mean(x^2) + eps)      v = w, norm_style "gemma": 1 + w
Nothing is rounded on the way; one rounding, to x's dtype, ends it. (So "llama" and "olmo2", which
differ in a rounding between norm and product, are the same here.)

Backward: g is dx' turned by the opposite angles. Without a norm that is dx. With one,
    dx = (g * v - n * mean(g * v * n)) / sqrt(mean(x^2) + eps)
    dw = sum over tokens and heads of g * n
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.ops.rms_norm.reference import compute_dtype, scale

STYLES = ("half", "interleaved")


class Problem(NamedTuple):
    """The facts that decide which backend can serve a call."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    style: str = "half"
    norm_style: str | None = None  # None: no norm
    query_heads: int = 0
    key_heads: int = 0
    rows: int = 0  # tokens; a power of two


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_style: str,
    style: str,
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D), k (T, Hk, D), table (T, R/2), weights (D,) -> q', k', contiguous."""
    table = _table(cos, sin, q.dtype)
    return (
        _forward(q, table, q_norm, eps, norm_style, style),
        _forward(k, table, k_norm, eps, norm_style, style),
    )


def backward(
    dq: Tensor | None,
    dk: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_style: str,
    style: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q', k' -> gradients of q, k, q_norm, k_norm; what isn't in `needs` is empty.

    q, k are needed with norms only; dq, dk may be None where nothing of theirs is in `needs`.
    """
    some = dk if dq is None else dq
    assert some is not None
    dx, dweight = ([some.new_empty(0) for _ in range(2)] for _ in range(2))
    for side, (dy, x, weight) in enumerate(((dq, q, q_norm), (dk, k, k_norm))):
        if dy is None or not (needs[side] or needs[2 + side]):
            continue
        wide = compute_dtype(dy.dtype)
        c, s = _table(cos, sin, dy.dtype)
        grad = turned(dy.to(wide), c, -s, style)
        if x is not None and weight is not None:
            rstd = _rstd(x.to(wide), eps)
            normalized = x.to(wide) * rstd
            if needs[2 + side]:
                dweight[side] = (grad * normalized).sum((0, 1)).to(weight.dtype)
            grad = grad * scale(weight, norm_style, wide)
            grad = (grad - normalized * (grad * normalized).mean(-1, keepdim=True)) * rstd
        if needs[side]:
            rest = dy[..., 2 * cos.shape[1] :] if x is None else None
            dx[side] = stored(grad, dy.dtype, rest)
    return dx[0], dx[1], dweight[0], dweight[1]


def turned(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """x (T, H, D) with its pairs turned by the table (T, R/2), all of one dtype."""
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    if style == "half":
        a, b = head[..., :half], head[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
    a, b = head[..., 0::2], head[..., 1::2]
    pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((pairs.flatten(-2), rest), -1)


def stored(x: Tensor, dtype: torch.dtype, rest: Tensor | None) -> Tensor:
    """x in `dtype`, contiguous; `rest` are the last elements of each head as they were."""
    result = x.to(dtype)
    if rest is not None:  # through float32 a NaN could lose its payload
        result[..., x.shape[-1] - rest.shape[-1] :] = rest
    return result


def _forward(
    x: Tensor,
    table: tuple[Tensor, Tensor],
    weight: Tensor | None,
    eps: float,
    norm_style: str,
    style: str,
) -> Tensor:
    wide = x.to(table[0].dtype)
    if weight is not None:
        wide = wide * _rstd(wide, eps) * scale(weight, norm_style, wide.dtype)
    rest = x[..., 2 * table[0].shape[1] :] if weight is None else None
    return stored(turned(wide, *table, style), x.dtype, rest)


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _table(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(dtype)
    return cos.to(wide), sin.to(wide)
