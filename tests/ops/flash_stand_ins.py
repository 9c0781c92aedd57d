"""FlashAttention on machines that have none: what its documentation says, under the signatures of
flash-attn 2.8, 3 (of 2025, and an earlier one) and 4.0.0b36."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """One document's, by FlashAttention's documentation. A query sees `left` keys before and
    `right` keys after its own; negative: all."""

    span: slice
    query: Tensor  # (Hq, n, D) float32; key and value too
    key: Tensor
    value: Tensor
    scores: Tensor  # (Hq, n, n), -infinity where hidden
    slope: Tensor  # of softcap


def scores_of(q, k, v, offsets, most, causal, left, right, scale, softcap=0.0):
    """The scores of each document that isn't empty."""
    assert offsets.dtype == torch.int32 and scale > 0
    bounds = list(pairwise(offsets.tolist()))
    assert most == max(end - begin for begin, end in bounds)
    for begin, end in bounds:
        query, key, value = (t[begin:end].float().transpose(0, 1) for t in (q, k, v))
        key, value = (t.repeat_interleave(q.shape[1] // k.shape[1], 0) for t in (key, value))
        scores = query @ key.transpose(1, 2) * scale
        slope = torch.ones_like(scores)
        if softcap > 0:
            slope = 1 - torch.tanh(scores / softcap).square()
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(end - begin)
        behind = place[:, None] - place[None, :]
        hidden = (behind < 0) if causal else torch.zeros_like(behind, dtype=torch.bool)
        if left >= 0:
            hidden = hidden | (behind > left)
        if right >= 0:
            hidden = hidden | (-behind > right)
        scores = scores.masked_fill(hidden, -math.inf)
        yield Scores(slice(begin, end), query, key, value, scores, slope)


def attention(q, *options):
    """o (T, Hq, D) of q's dtype and lse (Hq, T) float32."""
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0])
    for each in scores_of(q, *options):
        o[each.span] = (each.scores.softmax(-1) @ each.value).transpose(0, 1)
        lse[:, each.span] = each.scores.logsumexp(-1)
    return o, lse


def gradients(do, q, k, v, o, lse, *options):
    """dq, dk, dv from what the forward pass above gave."""
    again, logsumexp = attention(q, k, v, *options)
    assert torch.equal(o, again) and torch.equal(lse, logsumexp)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    scale = options[5]
    for each in scores_of(q, k, v, *options):
        grad, kept = (t[each.span].float().transpose(0, 1) for t in (do, o))
        p = (each.scores - lse[:, each.span, None]).exp()
        ds = p * (grad @ each.value.transpose(1, 2) - (grad * kept).sum(-1, keepdim=True))
        ds = ds * each.slope * scale
        dq[each.span] = (ds @ each.key).transpose(0, 1)
        for found, shares in ((dk, ds.mT @ each.query), (dv, p.mT @ grad)):
            shared = shares.unflatten(0, (k.shape[1], -1)).sum(1)
            found[each.span] = shared.transpose(0, 1)
    return dq, dk, dv


# ---- flash-attn, version by version --------------------------------------------------------------


@torch.library.custom_op("flash_attn_stand_in::varlen_forward", mutates_args=())
def version_2_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert dropout_p == 0 and alibi_slopes is None and not return_softmax
    window = (window_size_left, window_size_right)
    o, lse = attention(q, k, v, cu_seqlens_k, max_seqlen_q, causal, *window, softmax_scale, softcap)
    return o, lse, q.new_empty(0), q.new_empty(0)


@torch.library.custom_op("flash_attn_stand_in::varlen_backward", mutates_args=("dq", "dk", "dv"))
def version_2_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> torch.Tensor:
    assert dropout_p == 0 and alibi_slopes is None and not deterministic
    options = (cu_seqlens_k, max_seqlen_k, causal, window_size_left, window_size_right)
    found = gradients(dout, q, k, v, out, softmax_lse, *options, softmax_scale, softcap)
    for place, gradient in zip((dq, dk, dv), found, strict=True):
        place.copy_(gradient)
    return softmax_lse.clone()


# Of version 3 and 4, beside what is used here, some of what must be left alone.
def version_3_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
):
    assert k_new is v_new is qv is out_ is None and cu_seqlens_q is cu_seqlens_k
    window = (window_size_left, window_size_right)
    o, lse = attention(q, k, v, cu_seqlens_k, max_seqlen_k, causal, *window, softmax_scale, softcap)
    return o, lse, None, None


def version_3_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    options = (cu_seqlens_q, max_seqlen_q, is_causal, window_size_left, window_size_right)
    found = gradients(dout, q, k, v, out, softmax_lse, *options, softmax_scale, softcap)
    for place, gradient in zip((dq, dk, dv), found, strict=True):
        place.copy_(gradient)
    return softmax_lse


def earlier_version_3_forward(
    q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal, window_size=(-1, -1), softcap=0.0, num_splits=1,
):  # fmt: skip
    assert k_new is v_new is qv is out is None
    o, lse = attention(
        q, k, v, cu_seqlens_k, max_seqlen_k, causal, *window_size, softmax_scale, softcap
    )
    return o, lse


def earlier_version_3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
    max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    options = (cu_seqlens_q, max_seqlen_q, causal, *window_size, softmax_scale, softcap)
    return (*gradients(dout, q, k, v, out, softmax_lse, *options), softmax_lse)


def unlimited(end):
    assert end is None or end >= 0  # -1 before a causal end is a window of its own
    return -1 if end is None else end


def version_4_forward(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    learnable_sink=None,
    return_lse=False,
    out=None,
    lse=None,
):
    assert return_lse and out is lse is None
    window = (unlimited(window_size_left), unlimited(window_size_right))
    o, lse = attention(
        q, k, v, cu_seqlens_k, max_seqlen_k, causal, *window, softmax_scale, softcap or 0.0
    )
    return o, lse, None, None, None


def version_4_backward(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    m_block_size=64,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    dlse=None,
):
    window = (unlimited(window_size_left), unlimited(window_size_right))
    options = (cu_seqlens_q, max_seqlen_q, causal, *window, softmax_scale, softcap)
    return gradients(dout, q, k, v, out, lse, *options)


VERSIONS = {
    "2": ("flash_attn.flash_attn_interface", version_2_forward, version_2_backward),
    "3": ("flash_attn_interface", version_3_forward, version_3_backward),
    "earlier 3": (
        "flash_attn_interface",
        earlier_version_3_forward,
        earlier_version_3_backward,
    ),
    "4": ("flash_attn.cute.interface", version_4_forward, version_4_backward),
}
NAMES = {
    "2": ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    "3": ("_flash_attn_forward", "_flash_attn_backward"),
    "earlier 3": ("_flash_attn_forward", "_flash_attn_backward"),
    "4": ("_flash_attn_fwd", "_flash_attn_bwd"),
}
