# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""Cross-entropy of rows of logits in Triton, for CUDA devices from compute capability 8.0.

One program per row. Where a row fits in registers, `forward_backward` reads it once and writes its
gradient over it. A longer row is walked over twice, in blocks: for its sums, and then backwards for
the gradient, so that what was read last, and is still in the L2 cache, is read first. Nothing
crosses programs: results are bitwise repeatable, and a row's don't depend on the rows beside it.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels import launcher
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.cross_entropy.reference import Problem, Terms
from fasttrain_kernels.ops.cross_entropy.triton_rows import (
    IGNORED,
    MAXIMUM,
    SUM,
    add_statistics,
    exp_weight,
    finite,
    gradient,
    load_capped,
    load_label,
    sums_held,
    sums_in_blocks,
    write_gradients,
    write_statistics,
    write_zeros,
)

# The widest row that is held in registers, by the 32 warps that a program can have, of 64 registers
# a thread: 8 floats each in every form, 32 where little but the row needs registers.
HELD_WIDTH = 8192
HELD_WIDTH_AT_BEST = 32768
# Otherwise a block is 16 bytes a thread. Where a row is read once, four programs of 8 warps fill a
# multiprocessor, and one's waiting is another's work. Where it is read again, all the rows in work
# should fit in the L2 cache, so programs are fewer and larger: two of 16 warps, or one of 32 for
# rows of more than WIDE bytes. On an H100, of 132 multiprocessors and 50 MB of L2, that is 34 MB
# for rows of 128 KB (64k classes in bfloat16) and again for rows of 256 KB.
READ_ONCE_WARPS = 8
READ_TWICE_WARPS = 16
WIDE_WARPS = 32
WIDE = 128 * 1024
# No fused multiply-add: of z = scale * logit, the largest would be unrounded in exp(z - maximum),
# but the maximum rounded. Memory is what these kernels wait for.
FUSED = False
MAX_CLASSES = 2**30  # columns are counted in 32 bits, and up to a block beyond the last

# A kernel reads a scalar of each: alignment, for which Triton compiles anew, would gain nothing.
ROW_POINTERS = ("targets_ptr", "statistics_ptr", "coefficients_ptr")


# ---- kernels: a program per row ------------------------------------------------------------------


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=ROW_POINTERS)
def forward_kernel(
    logits_ptr,
    targets_ptr,
    statistics_ptr,
    v,
    first,
    logits_stride,
    statistics_stride,
    slope,
    softcap,  # None: no softcap
    WANTS_TOTAL: tl.constexpr,
    WANTS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    target = tl.load(targets_ptr + row)
    row_ptr = logits_ptr + row * logits_stride
    statistics_ptr += row * statistics_stride
    if target == IGNORED:
        if first == 0:
            write_statistics(statistics_ptr, 0.0, 0.0, 0.0, 0.0, 0.0)
        return
    label = load_label(row_ptr, target - first, v, slope, softcap)
    maximum, sum_exp, total, weighted = sums_in_blocks(
        row_ptr, v, slope, softcap, WANTS_TOTAL, WANTS_ENTROPY, BLOCK
    )
    if first == 0:
        write_statistics(statistics_ptr, maximum, sum_exp, label, total, weighted)
    else:
        add_statistics(statistics_ptr, maximum, sum_exp, label, total, weighted)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=ROW_POINTERS)
def backward_kernel(
    logits_ptr,
    targets_ptr,
    statistics_ptr,
    coefficients_ptr,
    out_ptr,  # may be logits_ptr
    v,
    first,
    logits_stride,
    statistics_stride,
    out_stride,
    scale,
    slope,
    softcap,  # None: no softcap
    z_loss,  # None: no z-loss
    uniform,  # None: no label smoothing
    confidence,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    target = tl.load(targets_ptr + row)
    out_ptr += row * out_stride
    if target == IGNORED:
        write_zeros(out_ptr, v, BLOCK)
        return
    statistics_ptr += row * statistics_stride
    maximum = tl.load(statistics_ptr + MAXIMUM)
    weight = exp_weight(maximum, tl.load(statistics_ptr + SUM), z_loss)
    write_gradients(
        logits_ptr + row * logits_stride,
        out_ptr,
        tl.cast(target - first, tl.int32),
        v,
        finite(maximum),
        weight,
        tl.load(coefficients_ptr + row) * scale,
        slope,
        softcap,
        uniform,
        confidence,
        BLOCK,
    )


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def forward_backward_kernel(
    logits_ptr,
    targets_ptr,
    statistics_ptr,
    coefficients_ptr,
    v,
    logits_stride,
    statistics_stride,
    scale,
    slope,
    softcap,  # None: no softcap
    z_loss,  # None: no z-loss
    uniform,  # None: no label smoothing
    confidence,
    WANTS_ENTROPY: tl.constexpr,
    HELD: tl.constexpr,  # the block is the whole row
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    target = tl.load(targets_ptr + row)
    row_ptr = logits_ptr + row * logits_stride
    statistics_ptr += row * statistics_stride
    if target == IGNORED:
        write_statistics(statistics_ptr, 0.0, 0.0, 0.0, 0.0, 0.0)
        write_zeros(row_ptr, v, BLOCK)
        return
    label = load_label(row_ptr, target, v, slope, softcap)
    coefficient = tl.load(coefficients_ptr + row) * scale
    column = tl.arange(0, BLOCK)
    if HELD:
        z, ratio = load_capped(row_ptr, column, v, slope, softcap)
        maximum, sum_exp, total, weighted = sums_held(
            z, ratio, softcap, uniform is not None, WANTS_ENTROPY
        )
    else:
        maximum, sum_exp, total, weighted = sums_in_blocks(
            row_ptr, v, slope, softcap, uniform is not None, WANTS_ENTROPY, BLOCK
        )
    write_statistics(statistics_ptr, maximum, sum_exp, label, total, weighted)
    weight = exp_weight(maximum, sum_exp, z_loss)
    target = tl.cast(target, tl.int32)
    if HELD:
        grad = gradient(
            z,
            ratio,
            column == target,
            finite(maximum),
            weight,
            coefficient,
            softcap,
            uniform,
            confidence,
        )
        tl.store(row_ptr + column, grad.to(row_ptr.dtype.element_ty), mask=column < v)
    else:
        write_gradients(
            row_ptr,
            row_ptr,
            target,
            v,
            finite(maximum),
            weight,
            coefficient,
            slope,
            softcap,
            uniform,
            confidence,
            BLOCK,
        )


# ---- launches ------------------------------------------------------------------------------------


def unsupported(problem: Problem) -> str | None:
    """The reason why the Triton kernels can't serve `problem`, or None."""
    interpreted = not isinstance(forward_kernel, triton.JITFunction)
    if (reason := launcher.why_not_on(problem.device, interpreted=interpreted)) is not None:
        return reason
    if problem.dtype == torch.float64:
        return f"computes in float32, not {short(torch.float64)}"
    if problem.classes > MAX_CLASSES:
        return f"counts up to {MAX_CLASSES} classes; these are {problem.classes}"
    return None


@functools.cache
def block_shape(v: int, itemsize: int, warps: int = READ_ONCE_WARPS) -> tuple[int, int]:
    """Columns of a block that a row is walked over by, and the warps that share it."""
    block = min(warps * 512 // itemsize, triton.next_power_of_2(v))
    return block, max(1, block * itemsize // 512)


def whole_shape(logits: Tensor, terms: Terms) -> tuple[int, int, bool]:
    """What forward_backward takes for a block, its warps, and whether that is a row, and held."""
    v, itemsize = logits.shape[1], logits.dtype.itemsize
    aligned = v % 16 == 0 and logits.stride(0) % 16 == 0  # else each element needs a mask
    best = aligned and itemsize == 2 and terms.softcap is None
    if v <= (HELD_WIDTH_AT_BEST if best else HELD_WIDTH):
        block = triton.next_power_of_2(v)
        return block, max(1, min(32, block // 256)), True
    # With tanh, the compiler spills 8 bytes to have room for two programs of 16 warps.
    wide = v * itemsize > WIDE or terms.softcap is not None
    warps = WIDE_WARPS if wide else READ_TWICE_WARPS
    return *block_shape(v, itemsize, warps), False


def _logit_scalars(terms: Terms) -> dict[str, float | None]:
    """How a kernel makes z of a logit."""
    if terms.softcap is None:
        return {"slope": terms.scale, "softcap": None}
    return {"slope": terms.scale / terms.softcap, "softcap": terms.softcap}


def _gradient_scalars(terms: Terms, classes: int) -> dict[str, float | None]:
    """And how it makes the gradient."""
    return _logit_scalars(terms) | {
        "scale": terms.scale,
        "z_loss": terms.z_loss or None,
        "uniform": terms.label_smoothing / classes if terms.label_smoothing else None,
        "confidence": 1.0 - terms.label_smoothing,
    }


def forward(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    statistics: Tensor,
    wants_entropy: bool,
    first: int = 0,
) -> None:
    """As reference.forward; the statistics of an ignored row, which nothing reads, are 0."""
    rows, v = logits.shape
    if rows == 0:
        return
    block, warps = block_shape(v, logits.dtype.itemsize)
    with torch.cuda.device_of(logits):
        forward_kernel[(rows,)](
            logits,
            targets.contiguous(),
            statistics,
            v,
            first,
            logits.stride(0),
            statistics.stride(0),
            **_logit_scalars(terms),
            WANTS_TOTAL=bool(terms.label_smoothing),
            WANTS_ENTROPY=wants_entropy,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=FUSED,
        )


def backward(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    statistics: Tensor,
    coefficients: Tensor,
    out: Tensor,
    first: int,
    classes: int,
) -> None:
    """As reference.backward."""
    rows, v = logits.shape
    if rows == 0:
        return
    block, warps = block_shape(v, logits.dtype.itemsize)
    with torch.cuda.device_of(logits):
        backward_kernel[(rows,)](
            logits,
            targets.contiguous(),
            statistics,
            coefficients.contiguous(),
            out,
            v,
            first,
            logits.stride(0),
            statistics.stride(0),
            out.stride(0),
            **_gradient_scalars(terms, classes),
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=FUSED,
        )


def forward_backward(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    statistics: Tensor,
    wants_entropy: bool,
    coefficients: Tensor,
) -> None:
    """As reference.forward_backward; the statistics of an ignored row are 0."""
    rows, v = logits.shape
    if rows == 0:
        return
    block, warps, held = whole_shape(logits, terms)
    with torch.cuda.device_of(logits):
        forward_backward_kernel[(rows,)](
            logits,
            targets.contiguous(),
            statistics,
            coefficients.contiguous(),
            v,
            logits.stride(0),
            statistics.stride(0),
            **_gradient_scalars(terms, v),
            WANTS_ENTROPY=wants_entropy,
            HELD=held,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=FUSED,
        )
