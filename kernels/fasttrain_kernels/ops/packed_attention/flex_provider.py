"""FlexAttention (torch.nn.attention.flex_attention): the mask and the softcap written in Python, of
which torch.compile makes a kernel.

Its backward kernel can't be called with a saved o and lse: the backward pass computes the forward
pass again, under autograd. Lengths are dynamic, yet a value of window, softcap or scale that is new
compiles anew.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels import launcher
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.packed_attention.providers import unserved
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask, Problem


def unsupported(problem: Problem) -> str | None:
    """The reason why FlexAttention can't serve `problem`, or None."""
    if (reason := launcher.why_not_gpu(problem.device) or launcher.why_not()) is not None:
        return reason
    if problem.dtype == torch.float64:
        return f"computes in float32, not {short(problem.dtype)}"
    return unserved(problem, "sinks")


def advice(problem: Problem) -> str:
    """Always against."""
    return "recompiles for new lengths: by name only"


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, mask: Mask, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    o, lse = _attend(q, k, v, documents, mask)
    return o.contiguous(), lse.contiguous()


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
    with torch.enable_grad():
        leaves = q, k, v = [t.detach().requires_grad_() for t in (q, k, v)]
        again, _ = _attend(q, k, v, documents, mask)
        gradients = torch.autograd.grad(again, leaves, do)
    dq, dk, dv = (gradient.contiguous() for gradient in gradients)
    return dq, dk, dv, q.new_empty(0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, mask: Mask
) -> tuple[Tensor, Tensor]:
    """o (T, Hq, Dv) and lse (Hq, T)."""
    from torch.nn.attention.flex_attention import AuxRequest

    attention, block_mask = _compiled()
    length = q.shape[0]
    o, more = attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)),
        score_mod=_score_mod(mask),
        block_mask=block_mask(
            _mask_mod(documents, length, mask), None, None, length, length, device=q.device
        ),
        scale=mask.scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return o[0].transpose(0, 1), more.lse[0]


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """flex_attention and create_block_mask, which without a compiler would hold T x T scores."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return (
        torch.compile(flex_attention, dynamic=True),
        torch.compile(create_block_mask, dynamic=True),
    )


def _mask_mod(documents: Documents, length: int, mask: Mask) -> Callable[..., Tensor]:
    """(batch, head, i, j) -> query i sees key j."""
    tokens = torch.arange(length, dtype=torch.int32, device=documents.cu_seqlens.device)
    # The last document that begins at or before a token: of empty ones, that after them.
    document = torch.searchsorted(documents.cu_seqlens, tokens, right=True)

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = document[i] == document[j]
        if mask.causal:
            near = near & (j <= i)
        if mask.window is not None:
            near = near & ((i - j).abs() < mask.window)
        return near

    return seen


def _score_mod(mask: Mask) -> Callable[..., Tensor] | None:
    softcap = mask.softcap
    if softcap is None:
        return None

    def capped(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
