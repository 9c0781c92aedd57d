# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of cross-entropy do with one row of logits: device functions.

While the blocks of a row go by, each lane (a column modulo the block) keeps a maximum and sums of
its own; lanes are reduced once, at the row's end. Of exp(z - new maximum) and exp(old maximum - new
maximum) one is always 1, so an element still costs a single exponential.
"""

import torch
import triton
import triton.language as tl

from fasttrain_kernels.ops.cross_entropy import reference

MAXIMUM = tl.constexpr(reference.MAXIMUM)
SUM = tl.constexpr(reference.SUM)
LABEL = tl.constexpr(reference.LABEL)
TOTAL = tl.constexpr(reference.TOTAL)
WEIGHTED = tl.constexpr(reference.WEIGHTED)
IGNORED = tl.constexpr(reference.IGNORED)
INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

STAGES = tl.constexpr(3)  # a block in work, and two on their way


# ---- of a block of logits ------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """To 4 * 2^-24 of its value: near 0, where the quotient loses digits, by a polynomial.

    x + x^3 P(x^2), P the minimax fit in relative error for |x| < 0.55.
    """
    s = x * x
    near = x + x * s * (-0.33332947 + s * (0.13320725 + s * (-0.05267181 + s * 0.016437579)))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0.0, -far, far))


@triton.jit
def capped(logits, slope, softcap):
    """z in float32, and z / softcap: softcap * tanh(slope * logits), or slope * logits without."""
    ratio = logits.to(tl.float32) * slope
    z = ratio
    if softcap is not None:
        ratio = tanh(ratio)
        z = softcap * ratio
    return z, ratio


@triton.jit
def load_capped(row_ptr, column, v, slope, softcap):
    """z of a row's columns, and z / softcap. Beyond its end z is -inf, after tanh: before, tanh
    would make it finite."""
    inside = column < v
    logits = tl.load(row_ptr + column, mask=inside, other=0.0)
    z, ratio = capped(logits, slope, softcap)
    return tl.where(inside, z, -INFINITY), ratio


@triton.jit
def load_label(row_ptr, label, v, slope, softcap):
    """z of the label's column; 0 where that isn't among these columns."""
    inside = (label >= 0) & (label < v)
    logit = tl.load(row_ptr + label, mask=inside, other=0.0)
    z, _ = capped(logit, slope, softcap)
    return tl.where(inside, z, 0.0)


@triton.jit
def finite(maximum):
    """What is subtracted before exp: the maximum, but 0 for a row of nothing but -inf."""
    return tl.where(maximum == -INFINITY, 0.0, maximum)


@triton.jit
def gradient(z, ratio, is_label, maximum, weight, coefficient, softcap, uniform, confidence):
    """coefficient * (weight * exp(z - maximum) - uniform - confidence [label]) * dz/d(slope a)."""
    grad = tl.exp(z - maximum) * weight
    if uniform is not None:
        grad -= uniform
    grad = tl.where(is_label, grad - confidence, grad) * coefficient
    if softcap is not None:
        grad *= 1.0 - ratio * ratio
    return grad


# ---- of a row ------------------------------------------------------------------------------------


@triton.jit
def total_of(ratios, softcap):
    """The sum of z; what lies beyond the row has ratio 0."""
    total = tl.sum(ratios, axis=0)
    return total if softcap is None else total * softcap


@triton.jit
def sums_held(z, ratio, softcap, WANTS_TOTAL: tl.constexpr, WANTS_ENTROPY: tl.constexpr):
    """MAXIMUM, SUM, TOTAL and WEIGHTED of a whole row."""
    maximum = tl.max(z, axis=0)
    e = tl.exp(z - finite(maximum))
    total = tl.cast(0.0, tl.float32)
    weighted = tl.cast(0.0, tl.float32)
    if WANTS_TOTAL:
        total = total_of(ratio, softcap)
    if WANTS_ENTROPY:
        weighted = tl.sum(e * tl.where(e == 0.0, 0.0, z), axis=0)
    return maximum, tl.sum(e, axis=0), total, weighted


@triton.jit
def sums_in_blocks(
    row_ptr,
    v,
    slope,
    softcap,
    WANTS_TOTAL: tl.constexpr,
    WANTS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """MAXIMUM, SUM, TOTAL and WEIGHTED of a row that is read block by block."""
    lane = tl.arange(0, BLOCK)
    # Not -inf, from which -inf can't be subtracted. A lane that sees no more than -inf stays at 0.
    maximum = tl.full((BLOCK,), LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    weighteds = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, v, BLOCK, num_stages=STAGES):
        z, ratio = load_capped(row_ptr, start + lane, v, slope, softcap)
        e = tl.exp(-tl.abs(z - maximum))
        old = tl.where(z > maximum, e, 1.0)
        new = tl.where(z > maximum, 1.0, e)
        sum_exp = sum_exp * old + new
        if WANTS_TOTAL:
            totals += ratio
        if WANTS_ENTROPY:
            weighteds = weighteds * old + new * tl.where(new == 0.0, 0.0, z)
        maximum = tl.maximum(maximum, z)
    top = tl.max(maximum, axis=0)
    factor = tl.exp(maximum - top)
    sum_all = tl.sum(sum_exp * factor, axis=0)
    total = tl.cast(0.0, tl.float32)
    weighted = tl.cast(0.0, tl.float32)
    if WANTS_TOTAL:
        total = total_of(totals, softcap)
    if WANTS_ENTROPY:
        weighted = tl.sum(weighteds * factor, axis=0)
    return tl.where(sum_all == 0.0, -INFINITY, top), sum_all, total, weighted


@triton.jit
def exp_weight(maximum, sum_exp, z_loss):
    """What exp(z - maximum) is multiplied by to be its part of the gradient."""
    weight = 1.0 / sum_exp
    if z_loss is not None:
        weight *= 1.0 + 2.0 * z_loss * (maximum + tl.log(sum_exp))
    return weight


@triton.jit
def write_zeros(out_ptr, v, BLOCK: tl.constexpr):
    for start in tl.range(0, v, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + column, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=column < v)


@triton.jit
def write_gradients(
    row_ptr,
    out_ptr,  # may be row_ptr
    label,
    v,
    maximum,
    weight,
    coefficient,
    slope,
    softcap,
    uniform,
    confidence,
    BLOCK: tl.constexpr,
):
    """The gradient of a row, block by block, the last first."""
    last = tl.cdiv(v, BLOCK) - 1
    for back in tl.range(0, last + 1, num_stages=STAGES):
        column = (last - back) * BLOCK + tl.arange(0, BLOCK)
        z, ratio = load_capped(row_ptr, column, v, slope, softcap)
        grad = gradient(
            z, ratio, column == label, maximum, weight, coefficient, softcap, uniform, confidence
        )
        tl.store(out_ptr + column, grad.to(out_ptr.dtype.element_ty), mask=column < v)


@triton.jit
def write_statistics(ptr, maximum, sum_exp, label, total, weighted):
    tl.store(ptr + MAXIMUM, maximum)
    tl.store(ptr + SUM, sum_exp)
    tl.store(ptr + LABEL, label)
    tl.store(ptr + TOTAL, total)
    tl.store(ptr + WEIGHTED, weighted)


@triton.jit
def add_statistics(ptr, maximum, sum_exp, label, total, weighted):
    """Adds those of a row's further columns to what is there; as reference.merged."""
    before = tl.load(ptr + MAXIMUM)
    both = tl.maximum(before, maximum)
    # exp(-inf - -inf) is NaN; a part of nothing but -inf has no sums to scale.
    old, new = tl.exp(before - finite(both)), tl.exp(maximum - finite(both))
    sum_exp = tl.load(ptr + SUM) * old + sum_exp * new
    weighted = tl.load(ptr + WEIGHTED) * old + weighted * new
    label += tl.load(ptr + LABEL)
    total += tl.load(ptr + TOTAL)
    write_statistics(ptr, both, sum_exp, label, total, weighted)
