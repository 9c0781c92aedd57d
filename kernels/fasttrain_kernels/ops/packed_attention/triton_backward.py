# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""The backward pass of packed attention in Triton, in two kernels without atomics.

The first owns a block of queries of one head: it forms delta, which the second reads, and dq. The
second owns a block of keys of one key head, and walks over the queries of every query head of the
group for dk and dv. Scores are computed in both: 7 products where one kernel with atomics has 5,
and the same bits every time.
"""

import triton
import triton.language as tl

from fasttrain_kernels.ops.cross_entropy.triton_rows import tanh
from fasttrain_kernels.ops.packed_attention.triton_blocks import (
    BEGIN,
    BY_KEYS,
    COLUMNS,
    LENGTH,
    LOG2E,
    PRECISION,
    TILE,
    edge_positions,
    load_rows,
    own_rows,
    reach,
    rounded,
    shared_rows,
    store_rows,
)


@triton.jit
def weights_and_dscores(raw, dweights, seen, spoilt, lse, delta, factor, cap):
    """p and da of raw scores and dp; seen None: all are seen; spoilt None: nothing was NaN. lse in
    units of log2(e)."""
    scores = raw * factor
    if cap is not None:
        ratio = tanh(scores)
        scores = cap * ratio
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores - lse)
    dscores = weights * (dweights - delta)
    if cap is not None:
        dscores *= 1.0 - ratio * ratio
    if spoilt is not None:
        weights = tl.where(seen, weights + spoilt, 0.0)
        dscores = tl.where(seen, dscores + spoilt, 0.0)
    return weights, dscores


@triton.jit
def query_step(q, k, v, do, seen, spoilt, lse, delta, dq, factor, cap, ELEMENT: tl.constexpr):
    """Adds a block of keys to dq (queries, width), but for the scale."""
    raw = tl.dot(q, k.T, input_precision=PRECISION)
    dweights = tl.dot(do, v.T, input_precision=PRECISION)
    _, dscores = weights_and_dscores(
        raw, dweights, seen, spoilt, lse[:, None], delta[:, None], factor, cap
    )
    return tl.dot(rounded(dscores, ELEMENT), k, dq, input_precision=PRECISION)


@triton.jit
def key_step(q, k, v, do, seen, spoilt, lse, delta, dk, dv, factor, cap, ELEMENT: tl.constexpr):
    """Adds a block of queries to dk and dv (keys, width), dk but for the scale. Scores lie (keys,
    queries), as the products want them."""
    raw = tl.dot(k, q.T, input_precision=PRECISION)
    dweights = tl.dot(v, do.T, input_precision=PRECISION)
    weights, dscores = weights_and_dscores(
        raw, dweights, seen, spoilt, lse[None, :], delta[None, :], factor, cap
    )
    dv = tl.dot(rounded(weights, ELEMENT), do, dv, input_precision=PRECISION)
    dk = tl.dot(rounded(dscores, ELEMENT), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def queries_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    sinks_ptr,  # None: no sinks
    tiles_ptr,
    dq_ptr,
    delta_ptr,
    dsinks_ptr,  # (programs / HEADS, HEADS) float32: each program's part; None: no sinks
    tokens,
    do_token,  # strides: of a token, of a head
    do_head,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scale,
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
    do = load_rows(do_ptr + head * do_head, query, do_token, inside, WIDTH, BLOCK_WIDTH)
    o = load_rows(o_ptr + head * WIDTH, query, HEADS * WIDTH, inside, WIDTH, BLOCK_WIDTH)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = head * tokens + query
    lse = tl.load(lse_ptr + at, mask=inside, other=float("inf")) * LOG2E
    tl.store(delta_ptr + at, delta, mask=inside)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        share = tl.sum(tl.exp2(sink - lse) * delta, 0)
        tl.store(dsinks_ptr + tl.program_id(0), -share)

    q = load_rows(q_ptr + head * q_head, query, q_token, inside, WIDTH, BLOCK_WIDTH)
    k_ptr += head // GROUP * k_head
    v_ptr += head // GROUP * v_head
    dq = tl.full((QUERIES, BLOCK_WIDTH), 0.0, tl.float32)
    for number in tl.range(0, blocks):
        key = begin + inner + number * KEYS + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, k_token, None, WIDTH, BLOCK_WIDTH)
        v = load_rows(v_ptr, key, v_token, None, WIDTH, BLOCK_WIDTH)
        dq = query_step(q, k, v, do, None, None, lse, delta, dq, factor, cap, ELEMENT)
    for number in tl.range(0, edges):
        position = edge_positions(number, low, inner, blocks, KEYS)
        key = begin + position
        k = load_rows(k_ptr, key, k_token, position < length, WIDTH, BLOCK_WIDTH)
        v = load_rows(v_ptr, key, v_token, position < length, WIDTH, BLOCK_WIDTH)
        seen = (key[None, :] >= lower[:, None]) & (key[None, :] < upper[:, None])
        dq = query_step(q, k, v, do, seen, None, lse, delta, dq, factor, cap, ELEMENT)
    for number in tl.range(0, shared):
        row = low + number * KEYS + tl.arange(0, KEYS)
        key, exists, place = shared_rows(tile_ptr, row)
        # The query of this key saw it: were it NaN, so would be its lse.
        lse_of_key = tl.load(lse_ptr + head * tokens + key, mask=exists, other=0.0)
        sound = tl.abs(lse_of_key) < float("inf")
        spoilt = tl.where(sound, 0.0, float("nan"))
        k = load_rows(k_ptr, key, k_token, exists & sound, WIDTH, BLOCK_WIDTH)
        v = load_rows(v_ptr, key, v_token, exists & sound, WIDTH, BLOCK_WIDTH)
        seen = (place[None, :] >= lower[:, None]) & (place[None, :] < upper[:, None])
        dq = query_step(q, k, v, do, seen, spoilt[None, :], lse, delta, dq, factor, cap, ELEMENT)
    dq_ptr += head * WIDTH
    store_rows(dq_ptr, query, HEADS * WIDTH, inside, dq * scale, WIDTH, BLOCK_WIDTH)


@triton.jit
def keys_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    tiles_ptr,
    dk_ptr,
    dv_ptr,
    tokens,
    do_token,  # strides: of a token, of a head
    do_head,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scale,
    factor,
    cap,  # None: no softcap
    window,  # None: no window
    HEADS: tl.constexpr,  # of keys
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    key_head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    part = tl.program_id(0) // HEADS
    ELEMENT: tl.constexpr = k_ptr.dtype.element_ty
    PARTS: tl.constexpr = TILE // KEYS
    tile = tl.load(tiles_ptr + part // PARTS * COLUMNS + BY_KEYS)
    tile_ptr = tiles_ptr + tile * COLUMNS
    first_row = part % PARTS * KEYS
    low, edges, shared, inner, blocks = reach(
        tile_ptr, first_row, window, not CAUSAL, True, KEYS, QUERIES
    )
    begin, length = tl.load(tile_ptr + BEGIN), tl.load(tile_ptr + LENGTH)

    key, lower, upper, exists = own_rows(
        tile_ptr, first_row + tl.arange(0, KEYS), window, not CAUSAL, True
    )
    k = load_rows(k_ptr + key_head * k_head, key, k_token, exists, WIDTH, BLOCK_WIDTH)
    v = load_rows(v_ptr + key_head * v_head, key, v_token, exists, WIDTH, BLOCK_WIDTH)
    dk = tl.full((KEYS, BLOCK_WIDTH), 0.0, tl.float32)
    dv = tl.full((KEYS, BLOCK_WIDTH), 0.0, tl.float32)
    for number in tl.range(0, GROUP * blocks):
        head = key_head * GROUP + number // blocks
        query = begin + inner + number % blocks * QUERIES + tl.arange(0, QUERIES)
        q = load_rows(q_ptr + head * q_head, query, q_token, None, WIDTH, BLOCK_WIDTH)
        do = load_rows(do_ptr + head * do_head, query, do_token, None, WIDTH, BLOCK_WIDTH)
        lse = tl.load(lse_ptr + head * tokens + query) * LOG2E
        delta = tl.load(delta_ptr + head * tokens + query)
        dk, dv = key_step(q, k, v, do, None, None, lse, delta, dk, dv, factor, cap, ELEMENT)
    for number in tl.range(0, GROUP * edges):
        head = key_head * GROUP + number // edges
        position = edge_positions(number % edges, low, inner, blocks, QUERIES)
        query, inside = begin + position, position < length
        q = load_rows(q_ptr + head * q_head, query, q_token, inside, WIDTH, BLOCK_WIDTH)
        do = load_rows(do_ptr + head * do_head, query, do_token, inside, WIDTH, BLOCK_WIDTH)
        lse = tl.load(lse_ptr + head * tokens + query, mask=inside, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + head * tokens + query, mask=inside, other=0.0)
        seen = (query[None, :] >= lower[:, None]) & (query[None, :] < upper[:, None])
        dk, dv = key_step(q, k, v, do, seen, None, lse, delta, dk, dv, factor, cap, ELEMENT)
    for number in tl.range(0, GROUP * shared):
        head = key_head * GROUP + number // shared
        row = low + number % shared * QUERIES + tl.arange(0, QUERIES)
        query, inside, place = shared_rows(tile_ptr, row)
        lse = tl.load(lse_ptr + head * tokens + query, mask=inside, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + head * tokens + query, mask=inside, other=0.0)
        sound = tl.abs(delta) < float("inf")  # as o and do are
        spoilt = tl.where(sound, 0.0, float("nan"))[None, :]
        inside &= sound
        q = load_rows(q_ptr + head * q_head, query, q_token, inside, WIDTH, BLOCK_WIDTH)
        do = load_rows(do_ptr + head * do_head, query, do_token, inside, WIDTH, BLOCK_WIDTH)
        seen = (place[None, :] >= lower[:, None]) & (place[None, :] < upper[:, None])
        dk, dv = key_step(q, k, v, do, seen, spoilt, lse, delta, dk, dv, factor, cap, ELEMENT)
    dk_ptr += key_head * WIDTH
    dv_ptr += key_head * WIDTH
    store_rows(dk_ptr, key, HEADS * WIDTH, exists, dk * scale, WIDTH, BLOCK_WIDTH)
    store_rows(dv_ptr, key, HEADS * WIDTH, exists, dv, WIDTH, BLOCK_WIDTH)
