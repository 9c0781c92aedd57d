# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""Gated linear units in Triton, for CUDA devices from compute capability 8.0.

A program takes a block of one row. Tensors without gaps are one long row.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels import launcher
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.swiglu import reference
from fasttrain_kernels.ops.swiglu.reference import Problem

BLOCK = 1024
WARPS = 4  # 8 elements a thread: 16 bytes a load in 16-bit dtypes
SATURATED = tl.constexpr(reference.SATURATED)
LINEAR = tl.constexpr(reference.LINEAR)
CUBIC = tl.constexpr(reference.CUBIC)
ONE_OVER_ROOT_TWO_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def logistic(x):
    """The logistic function and its derivative, by an exponential that can't overflow."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0, smaller, larger), smaller * larger


@triton.jit
def normal(x):
    """The normal distribution and its density; the polynomial is that of csrc/cpu/vec_math.h."""
    gaussian = tl.exp(x * x * -0.5)
    t = 1.0 / (1.0 + 0.34 * tl.abs(x))
    p = t * -2.637027390e-2 + 1.406721771e-1
    p = p * t - 2.754624486e-1
    p = p * t + 2.047328055e-1
    p = p * t - 4.639515281e-2
    p = p * t + 1.160349920e-1
    p = p * t + 1.150350869e-1
    p = p * t + 1.361334771e-1
    p = p * t + 1.356193423e-1
    tail = p * t * gaussian
    return tl.where(x < 0, tail, 1.0 - tail), gaussian * ONE_OVER_ROOT_TWO_PI


@triton.jit
def share_and_slope(g, ACTIVATION: tl.constexpr):
    """As reference.share_and_slope."""
    if ACTIVATION == "silu":
        share, slope = logistic(g)
    elif ACTIVATION == "gelu_tanh":
        share, slope = logistic(g * (LINEAR + CUBIC * g * g))
        slope = slope * (LINEAR + 3 * CUBIC * g * g)
    else:
        share, slope = normal(g)
    return share, slope


@triton.jit
def place(width, BLOCK: tl.constexpr):
    """This program's row, and its columns."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    column = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, column


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    width,
    gate_stride,
    up_stride,
    y_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = place(width, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(gate < -SATURATED, -SATURATED, gate)  # an infinity times 0 would be NaN
    share, _ = share_and_slope(g, ACTIVATION)
    y = (g * share * up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * y_stride + column, y, mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,  # None: not wanted
    dup_ptr,  # None: not wanted
    width,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = place(width, BLOCK)
    inside = column < width
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(gate < -SATURATED, -SATURATED, gate)
    within = tl.where(g > SATURATED, SATURATED, g)
    share, slope = share_and_slope(within, ACTIVATION)
    if dgate_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        dgate = (dy * up * (share + within * slope)).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row * dgate_stride + column, dgate, mask=inside)
    if dup_ptr is not None:
        dup = (dy * (g * share)).to(dup_ptr.dtype.element_ty)
        tl.store(dup_ptr + row * dup_stride + column, dup, mask=inside)


def unsupported(problem: Problem) -> str | None:
    """The reason why the Triton kernel can't serve `problem`, or None."""
    interpreted = not isinstance(forward_kernel, triton.JITFunction)
    if (reason := launcher.why_not_on(problem.device, interpreted=interpreted)) is not None:
        return reason
    if problem.dtype == torch.float64:
        return f"computes in float32, not {short(torch.float64)}"
    return None


def _launch(kernel, tensors: tuple[Tensor | None, ...], activation: str) -> None:
    """Runs `kernel` on tensors of one shape (N, I), of which the first is given."""
    if all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(None if tensor is None else tensor.view(1, -1) for tensor in tensors)
    first = tensors[0]
    assert first is not None
    rows, width = first.shape
    programs = rows * triton.cdiv(width, BLOCK)
    if programs == 0:
        return
    with torch.cuda.device_of(first):
        kernel[(programs,)](
            *tensors,
            width,
            *(0 if tensor is None else tensor.stride(0) for tensor in tensors),
            ACTIVATION=activation,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def forward(gate: Tensor, up: Tensor, activation: str, y: Tensor) -> None:
    """As reference.forward."""
    _launch(forward_kernel, (gate, up, y), activation)


def backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dgate: Tensor | None,
    dup: Tensor | None,
) -> None:
    """As reference.backward."""
    _launch(backward_kernel, (dy, gate, up, dgate, dup), activation)
