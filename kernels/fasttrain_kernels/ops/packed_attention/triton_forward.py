# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""The forward pass of packed attention in Triton: the online softmax of FlashAttention-2 (Dao,
arXiv 2307.08691, algorithm 1), a block of queries and one head a program."""

import torch
import triton
import triton.language as tl

from fasttrain_kernels.ops.cross_entropy.triton_rows import tanh
from fasttrain_kernels.ops.packed_attention.triton_blocks import (
    BEGIN,
    COLUMNS,
    LENGTH,
    LN2,
    LOG2E,
    PRECISION,
    TILE,
    edge_positions,
    load_rows,
    nan_rows,
    own_rows,
    reach,
    rounded,
    shared_rows,
    store_rows,
)

# Not -inf, from which -inf can't be subtracted: the maximum of a row that has seen no key yet.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def softmax_step(q, k, v, seen, spoilt, top, total, o, factor, cap, ELEMENT: tl.constexpr):
    """Adds a block of keys to a row's maximum, sum and output; seen None: all are seen; spoilt
    None: no value was NaN."""
    scores = tl.dot(q, k.T, input_precision=PRECISION) * factor
    if spoilt is not None:
        scores = tl.where(tl.abs(scores) < float("inf"), scores + spoilt[None, :], float("nan"))
    if cap is not None:
        scores = cap * tanh(scores)
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(weights, 1)
    weights = rounded(weights, ELEMENT)
    o = tl.dot(weights, v, o * rescale[:, None], input_precision=PRECISION)
    return new_top, total, o


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,  # None: no sinks
    tiles_ptr,
    o_ptr,
    lse_ptr,
    tokens,
    q_token,  # strides: of a token, of a head
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    factor,
    cap,  # None: no softcap
    window,  # None: no window
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    part = tl.program_id(0) // HEADS
    ELEMENT: tl.constexpr = k_ptr.dtype.element_ty
    PARTS: tl.constexpr = TILE // QUERIES
    tile_ptr = tiles_ptr + part // PARTS * COLUMNS
    first_row = part % PARTS * QUERIES
    low, edges, shared, inner, blocks = reach(
        tile_ptr, first_row, window, True, not CAUSAL, QUERIES, KEYS
    )
    begin, length = tl.load(tile_ptr + BEGIN), tl.load(tile_ptr + LENGTH)

    query, lower, upper, inside = own_rows(
        tile_ptr, first_row + tl.arange(0, QUERIES), window, True, not CAUSAL
    )
    q = load_rows(q_ptr + head * q_head, query, q_token, inside, WIDTH, BLOCK_WIDTH)
    k_ptr += head // GROUP * k_head
    v_ptr += head // GROUP * v_head
    top = tl.full((QUERIES,), LOWEST, tl.float32)
    total = tl.full((QUERIES,), 0.0, tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E  # -inf: no sink
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    o = tl.full((QUERIES, BLOCK_WIDTH), 0.0, tl.float32)
    for number in tl.range(0, blocks):
        key = begin + inner + number * KEYS + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, k_token, None, WIDTH, BLOCK_WIDTH)
        v = load_rows(v_ptr, key, v_token, None, WIDTH, BLOCK_WIDTH)
        top, total, o = softmax_step(q, k, v, None, None, top, total, o, factor, cap, ELEMENT)
    for number in tl.range(0, edges):
        position = edge_positions(number, low, inner, blocks, KEYS)
        key = begin + position
        k = load_rows(k_ptr, key, k_token, position < length, WIDTH, BLOCK_WIDTH)
        v = load_rows(v_ptr, key, v_token, position < length, WIDTH, BLOCK_WIDTH)
        seen = (key[None, :] >= lower[:, None]) & (key[None, :] < upper[:, None])
        top, total, o = softmax_step(q, k, v, seen, None, top, total, o, factor, cap, ELEMENT)
    for number in tl.range(0, shared):
        row = low + number * KEYS + tl.arange(0, KEYS)
        key, exists, place = shared_rows(tile_ptr, row)
        spoilt = nan_rows(load_rows(v_ptr, key, v_token, exists, WIDTH, BLOCK_WIDTH))
        k = load_rows(k_ptr, key, k_token, exists, WIDTH, BLOCK_WIDTH)
        sound = exists & (spoilt == 0.0)
        v = load_rows(v_ptr, key, v_token, sound, WIDTH, BLOCK_WIDTH)
        seen = (place[None, :] >= lower[:, None]) & (place[None, :] < upper[:, None])
        top, total, o = softmax_step(q, k, v, seen, spoilt, top, total, o, factor, cap, ELEMENT)

    o_ptr += head * WIDTH
    store_rows(o_ptr, query, HEADS * WIDTH, inside, o / total[:, None], WIDTH, BLOCK_WIDTH)
    tl.store(lse_ptr + head * tokens + query, (top + tl.log2(total)) * LN2, mask=inside)
