"""torch.nn.attention.varlen: FlashAttention 2 as PyTorch ships it, for packed documents.

The op behind its public function, whose first ten arguments are the same from torch 2.11 on and
which, unlike the function, lets key heads be shared in all of them.
"""

from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.ops.packed_attention.providers import (
    flash_varies,
    flash_why_not,
    flash_window,
    longest,
    positive_scale,
    unserved,
)
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask, Problem


def unsupported(problem: Problem) -> str | None:
    """The reason why torch's varlen attention can't serve `problem`, or None."""
    if (reason := flash_why_not(problem) or unserved(problem, "softcap", "sinks")) is not None:
        return reason
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention"
    return None


def varies(problem: Problem) -> str | None:
    """Why two calls may differ in bits, or None."""
    return flash_varies(problem)


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, mask: Mask, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    q, mask, _ = positive_scale(q, mask)
    o, lse, _ = _ops()._varlen_attn(
        q, k, v, *_lengths(documents), _causal(mask), mask.scale, list(flash_window(mask))
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
    q, mask, sign = positive_scale(q, mask)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is 0
    dq, dk, dv = _ops()._varlen_attn_backward(
        *(do, q, k, v, o, lse, *_lengths(documents), _causal(mask), state, mask.scale),
        list(flash_window(mask)),
    )
    return dq if sign == 1 else dq * sign, dk, dv, q.new_empty(0)


def _ops() -> Any:
    from torch.nn.attention import varlen  # noqa: F401  (defines them)

    return torch.ops.torch_attn


def _lengths(documents: Documents) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens of queries and of keys, and their longest."""
    offsets, most = documents.cu_seqlens.contiguous(), longest(documents)
    return offsets, offsets, most, most


def _causal(mask: Mask) -> bool:
    """The kernel's flag, which with a window says nothing that the window doesn't."""
    return flash_window(mask) == (-1, 0)
