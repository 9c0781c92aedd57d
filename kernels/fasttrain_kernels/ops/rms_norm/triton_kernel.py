# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""RMS normalisation in Triton, for CUDA devices from compute capability 8.0.

A fixed number of programs walk over tiles of whole rows, loading one tile while they work on the
other. In the backward pass each keeps its share of dw in registers and writes it once, so that no
atomics are needed (the result is bitwise repeatable on one device) and the partial sums are a few
MB, however many rows there are.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels import launcher
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.rms_norm import reference
from fasttrain_kernels.ops.rms_norm.reference import Problem

# The backward pass holds a row of n, of g and of dw in registers: at this width and 16 warps 3 * 16
# floats a thread, of 128 registers. Twice the width spills, and would want a second kernel.
MAX_WIDTH = 8192
INTERPRETED_PROGRAMS = 3  # the interpreter takes about 2 ms per program; more than one is a test


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,  # None: no residual
    weight_ptr,
    y_ptr,
    sum_ptr,  # None: no residual
    rstd_ptr,
    rows,
    width,
    x_stride,
    residual_stride,
    eps,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=2
    ):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (row < rows) & (column < width)
        value = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
        if residual_ptr is not None:
            other = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
            value = (value.to(tl.float32) + other.to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * width + column, value, mask=inside)
        x = value.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / width + eps)
        normalized = x * rstd
        if CAST_FIRST:
            normalized = normalized.to(value.dtype).to(tl.float32)
        y = (normalized * weight).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * width + column, y, mask=inside)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def backward_kernel(
    dy_ptr,
    dsum_ptr,  # None: nothing reaches the sum beside the norm
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,  # None: not wanted
    partial_ptr,  # (programs, width) float32; None: dw not wanted
    rows,
    width,
    x_stride,
    OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    share = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=2
    ):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (row < rows) & (column < width)
        at = row * width + column
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normalized = x * rstd
        if dx_ptr is not None:
            grad = dy * weight
            dot = tl.sum(grad * normalized, axis=1, keep_dims=True) / width
            dx = (grad - normalized * dot) * rstd
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            share += dy * normalized
    if partial_ptr is not None:
        program = tl.cast(tl.program_id(0), tl.int64)
        total = tl.sum(share, axis=0, keep_dims=True)
        tl.store(partial_ptr + program * width + column, total, mask=column < width)


def unsupported(problem: Problem) -> str | None:
    """The reason why the Triton kernel can't serve `problem`, or None."""
    interpreted = not isinstance(forward_kernel, triton.JITFunction)
    if (reason := launcher.why_not_on(problem.device, interpreted=interpreted)) is not None:
        return reason
    dtypes = (problem.dtype, problem.weight_dtype, problem.residual_dtype)
    if torch.float64 in dtypes:
        return f"computes in float32, not {short(torch.float64)}"
    if problem.width > MAX_WIDTH:
        return f"holds rows of up to {MAX_WIDTH} elements; these have {problem.width}"
    return None


@functools.cache
def block_shape(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and the warps that share it: 8 elements a thread up to 4096."""
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, 1024 // block_width)
    return block_rows, block_width, min(16, block_rows * block_width // 256)


@functools.cache
def _resident_programs(device: torch.device, warps: int) -> int:
    """How many programs run at once: 32 warps a multiprocessor, at 64 registers a thread.

    Where a kernel needs more registers (at most 128), some wait: slower, and as right.
    """
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * (32 // warps)


def _grid(x: Tensor) -> tuple[int]:
    block_rows, _, warps = block_shape(x.shape[1])
    return (min(-(-x.shape[0] // block_rows), _resident_programs(x.device, warps)),)


def forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, style: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.forward."""
    rows, width = x.shape
    residual_dtype = None if residual is None else residual.dtype
    total_dtype = reference.sum_dtype(x.dtype, residual_dtype)
    y_dtype = reference.output_dtype(x.dtype, residual_dtype, weight.dtype, style)
    y = x.new_empty(x.shape, dtype=y_dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=total_dtype)
    rstd = x.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return y, total, rstd
    block_rows, block_width, warps = block_shape(width)
    with torch.cuda.device_of(x):
        forward_kernel[_grid(x)](
            x,
            residual,
            weight.contiguous(),
            y,
            None if residual is None else total,
            rstd,
            rows,
            width,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            OFFSET=1.0 if style == "gemma" else 0.0,
            CAST_FIRST=style == "llama",
            BLOCK_ROWS=block_rows,
            BLOCK_WIDTH=block_width,
            num_warps=warps,
        )
    return y, total, rstd


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    style: str,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """As reference.backward."""
    rows, width = x.shape
    dx = x.new_empty(x.shape if needs_dx else 0)
    grid = _grid(x)
    partials = rstd.new_empty(grid[0] if needs_dweight else 0, width)
    block_rows, block_width, warps = block_shape(width)
    if rows > 0:
        with torch.cuda.device_of(x):
            backward_kernel[grid](
                dy.contiguous(),
                None if dsum is None else dsum.contiguous(),
                x,
                weight.contiguous(),
                rstd,
                dx if needs_dx else None,
                partials if needs_dweight else None,
                rows,
                width,
                x.stride(0),
                OFFSET=1.0 if style == "gemma" else 0.0,
                BLOCK_ROWS=block_rows,
                BLOCK_WIDTH=block_width,
                num_warps=warps,
            )
    dweight = partials.sum(0).to(weight.dtype) if needs_dweight else weight.new_empty(0)
    return dx, dweight
