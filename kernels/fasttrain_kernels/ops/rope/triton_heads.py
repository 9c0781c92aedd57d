# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""What Triton's kernels of rope do to the heads of one side, the queries or the keys.

`NEIGHBOURS` is style "interleaved": such pairs are loaded as they lie and taken apart in registers.
"""

import triton
import triton.language as tl


@triton.jit
def load_pairs(rows, known, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Pairs of the heads that `rows` (heads, 1) point to, in float32; 0 where not `known`."""
    if NEIGHBOURS:
        element = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.load(rows + element, mask=known & (element < 2 * HALF), other=0.0)
        a, b = tl.split(tl.reshape(both.to(tl.float32), (rows.shape[0], BLOCK_HALF, 2)))
    else:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        inside = known & (pair < HALF)
        a = tl.load(rows + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(rows + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(
    rows, a, b, known, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, NEIGHBOURS: tl.constexpr
):
    element_type = rows.dtype.element_ty
    if NEIGHBOURS:
        element = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.reshape(tl.join(a, b), (rows.shape[0], 2 * BLOCK_HALF)).to(element_type)
        tl.store(rows + element, both, mask=known & (element < 2 * HALF))
    else:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        inside = known & (pair < HALF)
        tl.store(rows + pair, a.to(element_type), mask=inside)
        tl.store(rows + HALF + pair, b.to(element_type), mask=inside)


@triton.jit
def load_angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, HALF, BLOCK_HALF: tl.constexpr):
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + token * cos_stride + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * sin_stride + pair, mask=pair < HALF, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def turn_side(
    x_ptr,
    out_ptr,
    weight_ptr,  # None: no norm
    token,
    cos,
    sin,
    heads,
    token_stride,
    head_stride,
    eps,
    OFFSET: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0: all of a head is turned
):
    for first in range(0, heads, BLOCK_HEADS):
        head = tl.cast(first + tl.arange(0, BLOCK_HEADS)[:, None], tl.int64)
        known = head < heads
        rows = x_ptr + token * token_stride + head * head_stride
        out_rows = out_ptr + (token * heads + head) * HEAD_DIM
        a, b = load_pairs(rows, known, HALF, BLOCK_HALF, NEIGHBOURS)
        if BLOCK_REST > 0:
            element = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            inside = known & (element < HEAD_DIM)
            rest = tl.load(rows + element, mask=inside, other=0.0)
        if weight_ptr is not None:
            square_sum = tl.sum(a * a + b * b, axis=1, keep_dims=True)
            if BLOCK_REST > 0:
                wide_rest = rest.to(tl.float32)
                square_sum += tl.sum(wide_rest * wide_rest, axis=1, keep_dims=True)
            rstd = tl.rsqrt(square_sum / HEAD_DIM + eps)
            weights = weight_ptr + tl.zeros((1, 1), tl.int32)
            scale_a, scale_b = load_pairs(weights, True, HALF, BLOCK_HALF, NEIGHBOURS)
            a = a * rstd * (scale_a + OFFSET)
            b = b * rstd * (scale_b + OFFSET)
            if BLOCK_REST > 0:
                scale = tl.load(weight_ptr + element, mask=element < HEAD_DIM, other=0.0)
                rest = wide_rest * rstd * (scale.to(tl.float32) + OFFSET)
        first_half, second_half = a * cos - b * sin, b * cos + a * sin
        store_pairs(out_rows, first_half, second_half, known, HALF, BLOCK_HALF, NEIGHBOURS)
        if BLOCK_REST > 0:
            tl.store(out_rows + element, rest.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_side(
    grad_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,  # None: not wanted
    share_ptr,  # (head_dim,) of this program, float32; None: dw not wanted
    cos_ptr,
    sin_ptr,
    tokens,
    heads,
    grad_token_stride,
    grad_head_stride,
    x_token_stride,
    x_head_stride,
    cos_stride,
    sin_stride,
    eps,
    OFFSET: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    weights = weight_ptr + tl.zeros((1, 1), tl.int32)
    v_a, v_b = load_pairs(weights, True, HALF, BLOCK_HALF, NEIGHBOURS)
    v_a, v_b = v_a + OFFSET, v_b + OFFSET
    share_a = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    share_b = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    if BLOCK_REST > 0:
        element = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        v_rest = tl.load(weight_ptr + element, mask=element < HEAD_DIM, other=0.0)
        v_rest = v_rest.to(tl.float32) + OFFSET
        share_rest = tl.zeros((BLOCK_HEADS, BLOCK_REST), dtype=tl.float32)
    for position in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(position, tl.int64)
        cos, sin = load_angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, HALF, BLOCK_HALF)
        for first in range(0, heads, BLOCK_HEADS):
            head = tl.cast(first + tl.arange(0, BLOCK_HEADS)[:, None], tl.int64)
            known = head < heads
            grad_rows = grad_ptr + token * grad_token_stride + head * grad_head_stride
            x_rows = x_ptr + token * x_token_stride + head * x_head_stride
            a, b = load_pairs(grad_rows, known, HALF, BLOCK_HALF, NEIGHBOURS)
            g_a, g_b = a * cos + b * sin, b * cos - a * sin
            x_a, x_b = load_pairs(x_rows, known, HALF, BLOCK_HALF, NEIGHBOURS)
            square_sum = tl.sum(x_a * x_a + x_b * x_b, axis=1, keep_dims=True)
            if BLOCK_REST > 0:
                inside = known & (element < HEAD_DIM)
                g_rest = tl.load(grad_rows + element, mask=inside, other=0.0).to(tl.float32)
                x_rest = tl.load(x_rows + element, mask=inside, other=0.0).to(tl.float32)
                square_sum += tl.sum(x_rest * x_rest, axis=1, keep_dims=True)
            rstd = tl.rsqrt(square_sum / HEAD_DIM + eps)
            n_a, n_b = x_a * rstd, x_b * rstd
            dot = tl.sum(g_a * v_a * n_a + g_b * v_b * n_b, axis=1, keep_dims=True)
            if BLOCK_REST > 0:
                n_rest = x_rest * rstd
                dot += tl.sum(g_rest * v_rest * n_rest, axis=1, keep_dims=True)
            if dx_ptr is not None:
                mean = dot / HEAD_DIM
                out_rows = dx_ptr + (token * heads + head) * HEAD_DIM
                dx_a, dx_b = (g_a * v_a - n_a * mean) * rstd, (g_b * v_b - n_b * mean) * rstd
                store_pairs(out_rows, dx_a, dx_b, known, HALF, BLOCK_HALF, NEIGHBOURS)
                if BLOCK_REST > 0:
                    dx_rest = (g_rest * v_rest - n_rest * mean) * rstd
                    tl.store(out_rows + element, dx_rest.to(dx_ptr.dtype.element_ty), mask=inside)
            share_a += g_a * n_a
            share_b += g_b * n_b
            if BLOCK_REST > 0:
                share_rest += g_rest * n_rest
    if share_ptr is not None:
        sum_a = tl.sum(share_a, axis=0, keep_dims=True)
        sum_b = tl.sum(share_b, axis=0, keep_dims=True)
        shares = share_ptr + tl.zeros((1, 1), tl.int32)
        store_pairs(shares, sum_a, sum_b, True, HALF, BLOCK_HALF, NEIGHBOURS)
        if BLOCK_REST > 0:
            sum_rest = tl.sum(share_rest, axis=0, keep_dims=True)
            tl.store(share_ptr + element, sum_rest, mask=element < HEAD_DIM)
