"""Attention within packed documents as PyTorch sees it: two opaque ops, a thin autograd function,
`packed_attention`.

The backend is chosen inside the ops, from shapes and from the documents' lengths as the host knows
them. What the backward pass needs beside its inputs is o and lse, which every backend saves alike.
"""

from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.checks import without_gaps
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.layout import DocumentLayout
from fasttrain_kernels.ops.packed_attention.arguments import (
    check,
    check_layout,
    checked_documents,
    describe,
    problem_of,
    under_autocast,
)
from fasttrain_kernels.ops.packed_attention.reference import Mask, compute_dtype
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.packed_attention"
NAME = "packed_attention"


PACKED_ATTENTION = Op(
    NAME,
    candidates=(
        Candidate("triton", f"{FOLDER}.triton_kernel", devices=("cuda",)),
        Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
        Candidate("flash-attn", f"{FOLDER}.flash_attn_provider", devices=("cuda",), provider=True),
        Candidate("varlen", f"{FOLDER}.varlen_provider", devices=("cuda",), provider=True),
        Candidate("flex", f"{FOLDER}.flex_provider", devices=("cuda",), provider=True),
        Candidate("sdpa", f"{FOLDER}.sdpa_provider", devices=("cpu", "cuda"), provider=True),
    ),
    folder=FOLDER,
    describe=describe,
    example={"head_dim": 128, "query_heads": 32, "key_heads": 8},
)

library = torch.library.Library("fasttrain", "FRAGMENT")
# offsets: cu_seqlens on the CPU, where it isn't there itself. tiles: made of them by backends that
# want them, where they are not given.
library.define(
    "packed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? offsets, "
    "Tensor? tiles, bool causal, SymInt? window, float? softcap, Tensor? sinks, float scale, "
    "str backend) -> (Tensor o, Tensor lse)"
)
library.define(
    "packed_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor cu_seqlens, Tensor? offsets, Tensor? tiles, bool causal, SymInt? window, "
    "float? softcap, Tensor? sinks, float scale, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    offsets: Tensor | None,
    tiles: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    documents = checked_documents(q, cu_seqlens, offsets, tiles)
    mask = Mask(causal, window, softcap, scale)
    if q.shape[0] == 0:
        return _forward_fake(
            q, k, v, cu_seqlens, offsets, tiles, causal, window, softcap, sinks, scale, backend
        )
    arguments = (without_gaps(q), without_gaps(k), without_gaps(v), documents, mask, sinks)
    o, lse = PACKED_ATTENTION.run(
        "forward",
        problem_of(q, k, v, documents, mask, sinks),
        backend,
        lambda kernel: kernel.forward(*arguments),
    )
    return o, lse


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    offsets: Tensor | None,
    tiles: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    documents = checked_documents(q, cu_seqlens, offsets, tiles)
    mask = Mask(causal, window, softcap, scale)
    if q.shape[0] == 0:
        dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
        return _like(q), _like(k), _like(v), dsinks
    heads = (without_gaps(do), without_gaps(q), without_gaps(k), without_gaps(v))
    dq, dk, dv, dsinks = PACKED_ATTENTION.run(
        "backward",
        problem_of(q, k, v, documents, mask, sinks),
        backend,
        lambda kernel: kernel.backward(*heads, o, lse, documents, mask, sinks),
    )
    return dq, dk, dv, dsinks


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    offsets: Tensor | None,
    tiles: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    o = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return o, q.new_empty(q.shape[1], q.shape[0], dtype=compute_dtype(q.dtype))


def _backward_fake(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    offsets: Tensor | None,
    tiles: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v), q.new_empty(0) if sinks is None else _like(sinks)


library.impl("packed_attention_forward", _forward, "CompositeExplicitAutograd")
library.impl("packed_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fasttrain::packed_attention_forward", _forward_fake, lib=library)
torch.library.register_fake("fasttrain::packed_attention_backward", _backward_fake, lib=library)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        offsets: Tensor | None,
        tiles: Tensor | None,
        causal: bool,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        scale: float,
        backend: str,
    ) -> Tensor:
        o, lse = torch.ops.fasttrain.packed_attention_forward(
            q, k, v, cu_seqlens, offsets, tiles, causal, window, softcap, sinks, scale, backend
        )
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, offsets, tiles, sinks)
        ctx.options = (causal, window, softcap, scale, backend)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "packed_attention is differentiable once: create_graph=True is not served"
            )
        q, k, v, o, lse, cu_seqlens, offsets, tiles, sinks = ctx.saved_tensors
        causal, window, softcap, scale, backend = ctx.options
        dq, dk, dv, dsinks = torch.ops.fasttrain.packed_attention_backward(
            do,
            q,
            k,
            v,
            o,
            lse,
            cu_seqlens,
            offsets,
            tiles,
            causal,
            window,
            softcap,
            sinks,
            scale,
            backend,
        )
        wants = ctx.needs_input_grad
        return (
            dq if wants[0] else None,
            dk if wants[1] else None,
            dv if wants[2] else None,
            *[None] * 6,
            dsinks if wants[9] else None,
            None,
            None,
        )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    layout: DocumentLayout | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Softmax attention of each document of a packed batch to itself; float32 inside.

    q (T, Hq, D), k (T, Hk, D), v (T, Hk, Dv) -> (T, Hq, Dv), for T tokens of documents that lie one
    after the other: document d holds tokens cu_seqlens[d] to cu_seqlens[d + 1] - 1. cu_seqlens
    (docs + 1,) int32 on q's device, from 0 to T; a document may be empty. Hq is a multiple of Hk:
    query heads h * Hq / Hk and following share key head h. Cost: the sum of squared lengths.

    layout: the same documents as the host knows them, DocumentLayout(lengths).to(q.device), made
        once for all layers. With it nothing waits for the device; without it, on a GPU, each call
        does once, and makes its tables itself.
    causal: a query sees no later key. window: nor any `window` or more positions away; it counts
        the query's own. softcap: scores become softcap * tanh(score / softcap).
    sinks (Hq,): a logit of each head that joins the softmax and adds nothing.
    scale: of the scores; by default 1 / sqrt(D).

    backend: "auto", or the name of one that must serve; `use()` and FASTTRAIN_KERNELS go before it.
    A document gives the same bits alone and among others, on every backend of ours. Differentiable
    once. Under autocast, q, k and v are taken in its dtype, as PyTorch's own attention takes them.

    Raises ValueError for shapes, dtypes, devices or cu_seqlens that don't fit, UnsupportedKernel
    where the backend asked for can't serve. Formulas and source: ops/packed_attention/reference.py.
    """
    q, k, v = under_autocast(q, k, v)
    check(q, k, v, cu_seqlens, window=window, softcap=softcap, sinks=sinks, scale=scale)
    if layout is not None:
        check_layout(layout, q, cu_seqlens)
    result: Tensor = _PackedAttention.apply(
        q,
        k,
        v,
        cu_seqlens,
        _host_offsets(cu_seqlens, layout),
        None if layout is None else layout.tiles,
        causal,
        window,
        softcap,
        sinks,
        q.shape[2] ** -0.5 if scale is None else scale + 0.0,  # a float of its own: see rms_norm
        backend,
    )
    return result


def _host_offsets(cu_seqlens: Tensor, layout: DocumentLayout | None) -> Tensor | None:
    """cu_seqlens on the CPU; None where it is there itself (Dynamo takes no tensor twice)."""
    if cu_seqlens.device.type == "cpu":
        return None
    return cu_seqlens.cpu() if layout is None else layout.offsets
