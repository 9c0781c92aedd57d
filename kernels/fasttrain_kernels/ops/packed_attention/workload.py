"""Documents that attend to themselves, and how models without a kernel do it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain_kernels.layout import DocumentLayout
from fasttrain_kernels.ops.packed_attention.op import packed_attention
from fasttrain_kernels.ops.packed_attention.reference import Problem
from fasttrain_kernels.settings import EAGER
from fasttrain_kernels.workload import Drawn, Workload

SOFTCAP = 50.0


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of documents of these lengths, by default of the problem's."""
    documents = lengths or _documents(rows or problem.rows, problem.document_length)
    tokens, dtype, device = sum(documents), problem.dtype, problem.device
    drawn, layout = Drawn(device), DocumentLayout(documents).to(device)
    cu_seqlens = layout.offsets.to(device)
    q = drawn.leaf(tokens, problem.query_heads, problem.head_dim, dtype=dtype)
    k = drawn.leaf(tokens, problem.key_heads, problem.head_dim, dtype=dtype)
    v = drawn.leaf(tokens, problem.key_heads, problem.value_dim, dtype=dtype)
    # Half of a typical document, so that some keys are out of sight.
    window = max(1, problem.document_length // 2) if problem.window else None
    softcap = SOFTCAP if problem.softcap else None
    sinks = drawn.normal(problem.query_heads, dtype=dtype) if problem.sinks else None

    def call(backend: str) -> Tensor:
        return packed_attention(
            q,
            k,
            v,
            cu_seqlens,
            layout=layout,
            causal=problem.causal,
            window=window,
            softcap=softcap,
            sinks=sinks,
            backend=backend,
        )

    def plain() -> Tensor:
        """PyTorch's attention, a call for each document, under a mask where there is a window; the
        reference where there is what it doesn't know."""
        if problem.softcap or problem.sinks:
            return call(EAGER)
        heads = (t.transpose(0, 1)[None].split(documents, 2) for t in (q, k, v))
        pieces = zip(*heads, strict=True)
        return torch.cat([_one(q, k, v, problem.causal, window) for q, k, v in pieces])

    gradient = drawn.normal(tokens, problem.query_heads, problem.value_dim, dtype=dtype)
    return Workload(call, plain, [q, k, v], [gradient])


def _documents(tokens: int, length: int) -> tuple[int, ...]:
    """As many of this length as there are tokens for, and the rest."""
    whole, rest = divmod(tokens, length)
    return (length,) * whole + ((rest,) if rest else ())


def _one(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    """One document, (1, H, n, D) each -> (n, Hq, Dv)."""
    mask = None
    if window is not None:
        position = torch.arange(q.shape[2], device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance if causal else distance.abs()) < window
        mask &= distance >= 0 if causal else True
    o = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return o[0].transpose(0, 1)
