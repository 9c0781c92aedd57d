"""What a call of packed_attention is checked for, and what a backend is told of it."""

import math

import torch
from torch import Tensor

from fasttrain_kernels import checks
from fasttrain_kernels.layout import DocumentLayout
from fasttrain_kernels.losses import can_look_at
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask, Problem
from fasttrain_kernels.problem import rounded

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
    rows: int = 0,
) -> Problem:
    """The problem of such heads; `document_length`: of the document that a token lies in, on
    average."""
    nearest = 1 << max(0, round(math.log2(max(1, document_length))))
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
        nearest,
        rounded(rows),
    )


def checked_documents(
    q: Tensor, cu_seqlens: Tensor, offsets: Tensor | None, tiles: Tensor | None
) -> Documents:
    """Checked, since kernels read where they are told."""
    if offsets is None:
        offsets = cu_seqlens.cpu()
    first, last = (int(offsets[0]), int(offsets[-1])) if offsets.numel() else (0, 0)
    if first != 0 or last != q.shape[0] or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"packed_attention: cu_seqlens must rise from 0 to T = {q.shape[0]}; "
            f"got {shortened(offsets)}"
        )
    return Documents(cu_seqlens, offsets, tiles)


def shortened(offsets: Tensor) -> str:
    values = offsets.tolist()
    if len(values) <= 8:
        return str(values)
    return f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}] ({len(values)} values)"


def problem_of(
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
        rows=q.shape[0],
    )


def under_autocast(*tensors: Tensor) -> list[Tensor]:
    device = tensors[0].device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not enabled or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float | None,
) -> None:
    """ValueError for what can be seen without looking at values on a device."""
    _check_heads(q, k, v)
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
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(
            f"packed_attention: sinks {tuple(sinks.shape)} must be (Hq,) = ({q.shape[1]},)"
        )
    _check_options(window, softcap, scale)


def _check_options(window: int | None, softcap: float | None, scale: float | None) -> None:
    if window is not None and (isinstance(window, float) or window < 1):
        raise ValueError(
            f"packed_attention: window={window}; it counts the keys that a query sees, itself "
            "included, so it is an integer of at least 1"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"packed_attention: softcap={softcap} must be positive and finite")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"packed_attention: scale={scale} must be finite")


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"packed_attention: expected q (T, Hq, D), k, v (T, Hk, ...); got {shapes}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"packed_attention: q and k must agree in tokens and width; got {shapes}")
    if 0 in (*q.shape[1:], *k.shape[1:], *v.shape[1:]):
        raise ValueError(f"packed_attention: heads and widths must not be 0; got {shapes}")
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"packed_attention: {q.shape[1]} query heads can't share {k.shape[1]} key heads equally"
        )


def check_layout(layout: DocumentLayout, q: Tensor, cu_seqlens: Tensor) -> None:
    """ValueError where the layout is of other documents, or elsewhere."""
    if layout.tiles.device != q.device:
        raise ValueError(
            f"packed_attention: the layout is on {layout.tiles.device}, q on {q.device}; "
            "give layout.to(q.device), made once a batch"
        )
    others = layout.offsets.shape != cu_seqlens.shape
    if others or (can_look_at(cu_seqlens) and not torch.equal(layout.offsets, cu_seqlens.cpu())):
        raise ValueError(
            "packed_attention: layout and cu_seqlens are of different documents; layout: "
            f"{shortened(layout.offsets)}, cu_seqlens: "
            f"{shortened(cu_seqlens) if can_look_at(cu_seqlens) else tuple(cu_seqlens.shape)}"
        )
