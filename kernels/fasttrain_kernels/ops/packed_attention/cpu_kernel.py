"""Attention within packed documents in C++ (csrc/cpu/packed_attention*.cpp), on torch's threads.

A task is one key head and a document (forward: up to 1152 queries of it), so the result is the same
bits on any number of threads, and whatever the other documents are.
"""

import torch
from torch import Tensor

from fasttrain_kernels import native
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask, Problem, compute_dtype

SERVED = (torch.float32, torch.float64, torch.bfloat16)


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    return native.cpu_why_not(problem.device, problem.dtype, SERVED)


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, mask: Mask, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=compute_dtype(q.dtype))
    torch.ops.fasttrain_native.packed_attention_forward(
        q, k, v, documents.offsets.contiguous(), *_options(q, mask, sinks), o, lse
    )
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    documents: Documents,
    mask: Mask,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.backward."""
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    delta = lse.new_empty(lse.shape)
    dsinks = lse.new_empty(0 if sinks is None else sinks.shape)
    torch.ops.fasttrain_native.packed_attention_backward(
        do,
        q,
        k,
        v,
        o.contiguous(),
        lse.contiguous(),
        documents.offsets.contiguous(),
        *_options(q, mask, sinks),
        dq,
        dk,
        dv,
        delta,
        dsinks,
    )
    return dq, dk, dv, dsinks if sinks is None else dsinks.to(sinks.dtype)


def _options(
    q: Tensor, mask: Mask, sinks: Tensor | None
) -> tuple[bool, int, float, Tensor | None, float]:
    wide = None if sinks is None else sinks.to(compute_dtype(q.dtype)).contiguous()
    return mask.causal, mask.window or 0, mask.softcap or 0.0, wide, mask.scale
