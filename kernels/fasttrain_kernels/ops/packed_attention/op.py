"""Attention within packed documents as PyTorch sees it: two opaque ops, a thin autograd function,
`packed_attention`.

The backend is chosen inside the ops, from shapes and from the documents' lengths as the host knows
them. What the backward pass needs beside its inputs is o and lse, which every backend saves alike.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels import checks
from fasttrain_kernels.dispatch import AUTO, Candidate, Op
from fasttrain_kernels.layout import DocumentLayout
from fasttrain_kernels.ops.packed_attention.reference import (
    Documents,
    Mask,
    Problem,
    compute_dtype,
)
from fasttrain_kernels.ops.packed_attention.tiles import tile_table

FOLDER = "fasttrain_kernels.ops.packed_attention"
NAME = "packed_attention"


def describe(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    query_heads: int,
    key_heads: int,
    value_dim: int | None = None,
    causal: bool = True,
    window: bool = False,
    softcap: bool = False,
    sinks: bool = False,
    document_length: int = 1024,
) -> Problem:
    """The problem of such heads; `document_length`: of the document that a token lies in, on
    average."""
    rounded = 1 << max(0, round(math.log2(max(1, document_length))))
    return Problem(
        torch.device(device),
        dtype,
        head_dim,
        value_dim or head_dim,
        query_heads,
        key_heads,
        causal,
        window,
        softcap,
        sinks,
        rounded,
    )


PACKED_ATTENTION = Op(
    NAME,
    candidates=(
        Candidate("triton", f"{FOLDER}.triton_kernel", devices=("cuda",)),
        Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
        Candidate("flash-attn", f"{FOLDER}.flash_attn_provider", devices=("cuda",)),
        Candidate("varlen", f"{FOLDER}.varlen_provider", devices=("cuda",)),
        Candidate("flex", f"{FOLDER}.flex_provider", devices=("cuda",)),
        Candidate("sdpa", f"{FOLDER}.sdpa_provider", devices=("cpu", "cuda")),
    ),
    reference=f"{FOLDER}.reference",
    self_test=f"{FOLDER}.self_test",
    describe=describe,
    example={"head_dim": 128, "query_heads": 32, "key_heads": 8},
)

library = torch.library.Library("fasttrain", "FRAGMENT")
# offsets (on the CPU) and tiles: made of cu_seqlens, which is waited for, where they are not given.
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
    documents = _documents(q, cu_seqlens, offsets, tiles)
    mask = Mask(causal, window, softcap, scale)
    if q.shape[0] == 0:
        return _forward_fake(
            q, k, v, cu_seqlens, offsets, tiles, causal, window, softcap, sinks, scale, backend
        )
    kernel = PACKED_ATTENTION.select(_problem(q, k, v, documents, mask, sinks), backend)
    o, lse = kernel.forward(_rows(q), _rows(k), _rows(v), documents, mask, sinks)
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
    documents = _documents(q, cu_seqlens, offsets, tiles)
    mask = Mask(causal, window, softcap, scale)
    if q.shape[0] == 0:
        dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
        return _like(q), _like(k), _like(v), dsinks
    kernel = PACKED_ATTENTION.select(_problem(q, k, v, documents, mask, sinks), backend)
    dq, dk, dv, dsinks = kernel.backward(
        _rows(do), _rows(q), _rows(k), _rows(v), o, lse, documents, mask, sinks
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


def _rows(tensor: Tensor) -> Tensor:
    """(T, H, D) with each head's elements side by side; tokens and heads may lie anywhere."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _documents(
    q: Tensor, cu_seqlens: Tensor, offsets: Tensor | None, tiles: Tensor | None
) -> Documents:
    """Checked, since kernels read where they are told. Waits for the device without `offsets`."""
    if offsets is None:
        offsets = cu_seqlens.cpu()
    first, last = (int(offsets[0]), int(offsets[-1])) if offsets.numel() else (0, 0)
    if first != 0 or last != q.shape[0] or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"packed_attention: cu_seqlens must rise from 0 to T = {q.shape[0]}; "
            f"got {_shortened(offsets)}"
        )
    if tiles is None:
        tiles = tile_table(offsets)
    return Documents(cu_seqlens, offsets, tiles.to(q.device))


def _shortened(offsets: Tensor) -> str:
    values = offsets.tolist()
    if len(values) <= 8:
        return str(values)
    return f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}] ({len(values)} values)"


def _problem(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, mask: Mask, sinks: Tensor | None
) -> Problem:
    lengths = documents.offsets.diff().double()
    return describe(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        query_heads=q.shape[1],
        key_heads=k.shape[1],
        causal=mask.causal,
        window=mask.window is not None,
        softcap=mask.softcap is not None,
        sinks=sinks is not None,
        document_length=round(float(lengths.square().sum()) / q.shape[0]),
    )


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

    layout: the same documents as the host knows them (DocumentLayout). With it nothing waits for
        the device; without it, on a GPU, each call does once.
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
    q, k, v = _under_autocast(q, k, v)
    _check(q, k, v, cu_seqlens, window, softcap, sinks)
    offsets, tiles = (None, None) if layout is None else (layout.offsets, layout.tiles)
    result: Tensor = _PackedAttention.apply(
        q,
        k,
        v,
        cu_seqlens,
        offsets,
        tiles,
        causal,
        window,
        softcap,
        sinks,
        q.shape[2] ** -0.5 if scale is None else scale + 0.0,  # a float of its own: see rms_norm
        backend,
    )
    return result


def _under_autocast(*tensors: Tensor) -> list[Tensor]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"packed_attention: expected q (T, Hq, D), k, v (T, Hk, ...); got {shapes}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or 0 in (*q.shape[1:], *v.shape[1:]):
        raise ValueError(f"packed_attention: q and k must agree in tokens and width; got {shapes}")
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"packed_attention: {q.shape[1]} query heads can't share {k.shape[1]} key heads equally"
        )
    checks.floating(NAME, q=q, k=k, v=v, sinks=sinks)
    checks.same_device(NAME, q=q, k=k, v=v, cu_seqlens=cu_seqlens, sinks=sinks)
    if not q.dtype == k.dtype == v.dtype:
        listed = ", ".join(map(checks.short, (q.dtype, k.dtype, v.dtype)))
        raise ValueError(f"packed_attention: q, k and v must be of one dtype; got {listed}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            "packed_attention: cu_seqlens must be int32 (docs + 1,); got "
            f"{checks.short(cu_seqlens.dtype)} {tuple(cu_seqlens.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"packed_attention: window={window}; it counts the keys that a query sees, itself "
            "included, so it is at least 1"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"packed_attention: softcap={softcap} must be positive")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(
            f"packed_attention: sinks {tuple(sinks.shape)} must be (Hq,) = ({q.shape[1]},)"
        )
