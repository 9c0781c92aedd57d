"""Attention within the documents of a packed batch, the definition: plain PyTorch, one document at
a time, float32 inside (float64 for float64 inputs).

Forward, for query i and key j of one document and one head (key heads serve equal groups of query
heads, in order), with a_ij = scale * q_i . k_j:
    s_ij  = a_ij, or softcap * tanh(a_ij / softcap)            (Gemma 2, arXiv 2408.00118)
    p_ij  = exp(s_ij - lse_i) where i sees j, else 0;  lse_i = log(sum_j exp(s_ij) [+ exp(sink)])
    o_i   = sum_j p_ij v_j
i sees j: where j <= i (causal), and where |i - j| < window. A sink is a logit of each query head
that takes part in the softmax and has no value (gpt-oss; Xiao et al., arXiv 2309.17453).

Backward, with delta_i = do_i . o_i and o as it was stored (Dao, arXiv 2307.08691, section 3.1):
    dv_j   = sum_i p_ij do_i                       summed over the query heads of a group
    ds_ij  = p_ij (do_i . v_j - delta_i),  da_ij = ds_ij (1 - (s_ij / softcap)^2)
    dq_i   = scale * sum_j da_ij k_j;  dk_j = scale * sum_i da_ij q_i
    dsink  = -sum_i exp(sink - lse_i) delta_i
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """The facts that decide which backend can serve a call."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int  # of queries and keys
    value_dim: int
    query_heads: int
    key_heads: int
    causal: bool
    window: bool
    softcap: bool
    sinks: bool
    document_length: int  # of the document that a token lies in, on average; a power of two
    rows: int = 0  # tokens; a power of two


class Documents(NamedTuple):
    """Where documents begin, for the device and for the host."""

    cu_seqlens: Tensor  # (docs + 1,) int32, on the device
    offsets: Tensor  # the same, on the CPU
    tiles: Tensor | None  # tiles.py, on the device; None: to be made of offsets

    def spans(self) -> list[slice]:
        """The tokens of each document that has any."""
        return [slice(a, b) for a, b in pairwise(self.offsets.tolist()) if a < b]


class Mask(NamedTuple):
    """What a query sees, and what is made of a score."""

    causal: bool
    window: int | None  # keys on either side, the query's own position included
    softcap: float | None
    scale: float


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, of sums and of lse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, mask: Mask, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D), k (T, Hk, D), v (T, Hk, Dv), sinks (Hq,) -> o (T, Hq, Dv), lse (Hq, T)."""
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=compute_dtype(q.dtype))
    for span in documents.spans():
        _, scores, value = _scores(q, k, v, span, mask)
        column = _sink_column(scores, sinks)
        lse[:, span] = torch.cat([scores, column], -1).logsumexp(-1)
        weights = (scores - lse[:, span, None]).exp()
        o[span] = (weights @ value).transpose(0, 1).to(o.dtype)
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
    """do, o (T, Hq, Dv), lse (Hq, T) -> dq, dk, dv as q, k, v, and dsinks (Hq,), without sinks
    empty."""
    wide = compute_dtype(q.dtype)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = (do.to(wide) * o.to(wide)).sum(-1).T  # (Hq, T)
    groups = q.shape[1] // k.shape[1]
    for span in documents.spans():
        raw, scores, value = _scores(q, k, v, span, mask)
        query, key = _heads(q, span, 1), _heads(k, span, groups)
        grad = _heads(do, span, 1)
        weights = (scores - lse[:, span, None]).exp()
        dscores = weights * (grad @ value.transpose(1, 2) - delta[:, span, None])
        if mask.softcap is not None:
            dscores = dscores * (1 - (raw / mask.softcap).tanh().square())
        dscores = dscores * mask.scale
        dq[span] = (dscores @ key).transpose(0, 1).to(dq.dtype)
        dk[span] = _grouped(dscores.transpose(1, 2) @ query, groups).to(dk.dtype)
        dv[span] = _grouped(weights.transpose(1, 2) @ grad, groups).to(dv.dtype)
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    share = (sinks.to(wide)[:, None] - lse).exp()
    return dq, dk, dv, -(share * delta).sum(-1).to(sinks.dtype)


def _heads(tensor: Tensor, span: slice, repeats: int) -> Tensor:
    """One document's tokens (n, H, D) as heads (H * repeats, n, D), in the dtype of computation."""
    heads = tensor[span].transpose(0, 1).to(compute_dtype(tensor.dtype))
    return heads.repeat_interleave(repeats, dim=0)


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """(Hk * groups, n, D) -> (n, Hk, D): the sum over each group."""
    return heads.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)


def _scores(
    q: Tensor, k: Tensor, v: Tensor, span: slice, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """a and s (Hq, n, n) of one document, s being -inf where a key isn't seen; v (Hq, n, Dv)."""
    groups = q.shape[1] // k.shape[1]
    query, key, value = _heads(q, span, 1), _heads(k, span, groups), _heads(v, span, groups)
    raw = query @ key.transpose(1, 2) * mask.scale
    capped = raw if mask.softcap is None else mask.softcap * (raw / mask.softcap).tanh()
    return raw, capped.masked_fill(~visible(raw.shape[-1], mask, q.device), float("-inf")), value


def visible(length: int, mask: Mask, device: torch.device) -> Tensor:
    """(n, n) bool: query i of a document sees key j."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    seen = distance >= 0 if mask.causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if mask.window is None else seen & (distance.abs() < mask.window)


def _sink_column(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """(Hq, n, 1) of sinks, or (Hq, n, 0)."""
    if sinks is None:
        return scores[..., :0]
    return sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
