"""Rotary position embedding in C++ (csrc/cpu/rope*.cpp): one pass over tokens, on torch's threads.

Bitwise repeatable, whatever the number of threads: the weights' gradients are added up in a fixed
order.
"""

import torch
from torch import Tensor

from fasttrain_kernels import native
from fasttrain_kernels.ops.rms_norm.reference import compute_dtype, scale
from fasttrain_kernels.ops.rope.reference import Problem

SERVED = (torch.float32, torch.float64, torch.bfloat16)

# The weights' gradients are summed over this many tokens at a time, then over these sums: so many
# tokens that writing the sums is a few per cent of the traffic, and at most MAX_CHUNKS sums.
TOKENS_PER_CHUNK = 32
MAX_CHUNKS = 256


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    return native.cpu_why_not(problem.device, problem.dtype, SERVED)


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
    """As reference.forward."""
    wide = compute_dtype(q.dtype)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    torch.ops.fasttrain_native.rope_forward(
        q,
        k,
        cos.to(wide),
        sin.to(wide),
        _scale(q_norm, norm_style, wide),
        _scale(k_norm, norm_style, wide),
        eps,
        style == "interleaved",
        False,
        q_out,
        k_out,
    )
    return q_out, k_out


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
    """As reference.backward."""
    dq = dq if needs[0] or needs[2] else None
    dk = dk if needs[1] or needs[3] else None
    some = dk if dq is None else dq
    assert some is not None
    wide = compute_dtype(some.dtype)
    dq_in = some.new_empty(dq.shape if dq is not None and needs[0] else 0)
    dk_in = some.new_empty(dk.shape if dk is not None and needs[1] else 0)
    table = cos.to(wide), sin.to(wide)
    interleaved = style == "interleaved"
    if q_norm is None or k_norm is None:
        turn = torch.ops.fasttrain_native.rope_forward
        turn(dq, dk, *table, None, None, eps, interleaved, True, dq_in, dk_in)
        return dq_in, dk_in, some.new_empty(0), some.new_empty(0)
    tokens, _, head_dim = some.shape
    chunks = min(MAX_CHUNKS, -(-tokens // TOKENS_PER_CHUNK))
    partials = cos.new_empty(chunks, 2, head_dim, dtype=wide)
    dweight = cos.new_empty(2, head_dim, dtype=wide)
    torch.ops.fasttrain_native.rope_norm_backward(
        dq,
        dk,
        q,
        k,
        *table,
        _scale(q_norm, norm_style, wide),
        _scale(k_norm, norm_style, wide),
        eps,
        interleaved,
        dq_in,
        dk_in,
        dweight,
        partials,
    )
    dq_norm, dk_norm = (
        dweight[side].to(weight.dtype, copy=True) if needs[2 + side] else some.new_empty(0)
        for side, weight in enumerate((q_norm, k_norm))
    )
    return dq_in, dk_in, dq_norm, dk_norm


def _scale(weight: Tensor | None, norm_style: str, dtype: torch.dtype) -> Tensor | None:
    return None if weight is None else scale(weight, norm_style, dtype).contiguous()
