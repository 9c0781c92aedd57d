"""torch's own attention (F.scaled_dot_product_attention), a call for each document: the kernels
behind it, whose forward passes return lse, so that a backward pass computes nothing twice.

On a CPU its flash kernel, on a GPU FlashAttention 2. One document costs what PyTorch's own call
costs, without a copy; many short ones cost a call each.
"""

import torch
from torch import Tensor

from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.packed_attention.providers import (
    flash_varies,
    flash_why_not,
    positive_scale,
    unserved,
    values_differ,
)
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask, Problem, compute_dtype


def unsupported(problem: Problem) -> str | None:
    """The reason why torch's own attention can't serve `problem`, or None."""
    reason = _cpu_why_not(problem) if problem.device.type == "cpu" else flash_why_not(problem)
    return reason or unserved(problem, "window", "softcap", "sinks")


def varies(problem: Problem) -> str | None:
    """Why two calls may differ in bits, or None."""
    return flash_varies(problem)


def _cpu_why_not(problem: Problem) -> str | None:
    if problem.dtype.itemsize == 2:
        # Up to 1.5 times what roundings allow; its exp is good to 1e-4 (Vectorized::fexp_u20).
        return f"adds up gradients in {short(problem.dtype)} on CPUs; serves float32 and float64"
    return values_differ(problem) if problem.value_dim != problem.head_dim else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, mask: Mask, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    spans = documents.spans()
    q, mask, _ = positive_scale(q, mask)
    if len(spans) == 1:
        o, lse = _forward(q, k, v, mask)
        return o.contiguous(), lse.contiguous()
    o = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=compute_dtype(q.dtype))
    for span in spans:
        o[span], lse[:, span] = _forward(q[span], k[span], v[span], mask)
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
    spans = documents.spans()
    q, mask, sign = positive_scale(q, mask)
    if len(spans) == 1:
        dq, dk, dv = (g.contiguous() for g in _backward(do, q, k, v, o, lse, mask))
    else:
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        for at in spans:
            dq[at], dk[at], dv[at] = _backward(do[at], q[at], k[at], v[at], o[at], lse[:, at], mask)
    return dq if sign == 1 else dq * sign, dk, dv, q.new_empty(0)


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """o (n, Hq, D) and lse (Hq, n) of one document."""
    batch = _batch(q, k)
    heads = (_heads(q, batch), *_shared(q, k, v, batch))
    if q.device.type == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads, 0.0, mask.causal, scale=mask.scale
        )
    else:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            *heads, 0.0, mask.causal, scale=mask.scale
        )[:2]
    return _tokens(o), lse.flatten(0, 1)


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of one document."""
    batch = _batch(q, k)
    heads = (_heads(do, batch), _heads(q, batch), *_shared(q, k, v, batch), _heads(o, batch))
    lse = lse.contiguous().unflatten(0, (batch, -1))
    if q.device.type == "cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads, lse, 0.0, mask.causal, scale=mask.scale
        )
    else:
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is 0
        length = q.shape[0]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(*heads, lse, None, None, length, length, 0.0, mask.causal, state, q.new_empty(0)),
            scale=mask.scale,
        )
    if batch > 1:
        dk, dv = (g.sum(1, keepdim=True) for g in (dk, dv))
    return _tokens(dq), _tokens(dk), _tokens(dv)


def _batch(q: Tensor, k: Tensor) -> int:
    """What the kernel takes for a batch: key heads where its queries' heads share them, except on
    a GPU, whose kernel knows of sharing."""
    return 1 if q.shape[1] == k.shape[1] or q.device.type != "cpu" else k.shape[1]


def _shared(q: Tensor, k: Tensor, v: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Keys and values for each head of the batch: one in memory, where heads share it."""
    heads = q.shape[1] // batch if batch > 1 else k.shape[1]
    key, value = (_heads(t, batch).expand(-1, heads, -1, -1) for t in (k, v))
    return key, value


def _heads(tensor: Tensor, batch: int) -> Tensor:
    """(n, batch * heads, D) as (batch, heads, n, D)."""
    return tensor.unflatten(1, (batch, -1)).permute(1, 2, 0, 3)


def _tokens(tensor: Tensor) -> Tensor:
    """(batch, heads, n, D) as (n, batch * heads, D)."""
    return tensor.permute(2, 0, 1, 3).flatten(1, 2)
