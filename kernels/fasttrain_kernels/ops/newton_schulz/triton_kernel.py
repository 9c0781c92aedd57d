# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""Newton-Schulz in Triton, for CUDA devices from compute capability 8.0.

The kernel makes products that are symmetric: of each pair of tiles across the diagonal it computes
one and stores it twice, which is half of the arithmetic of a plain product, for all matrices in one
launch. Products with X are the library's (cuBLAS), which adds a X within; there is nothing to save
in them.

Between steps everything is float16: after normalisation nothing is above a few dozen, and float16
rounds 8 times as finely as bfloat16 at the same speed. Norms and sums are in float32.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels import launcher
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.newton_schulz import reference
from fasttrain_kernels.ops.newton_schulz.forms import Products, iterate, library_wide
from fasttrain_kernels.ops.newton_schulz.reference import Coefficients, Problem

# Triton's interpreter multiplies no float16, so there products are of float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_pair(number):
    """The row and the column of a tile, of those at and below the diagonal counted by rows."""
    row = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)  # where float32 was off by one
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    return row, number - row * (row + 1) // 2


@triton.jit
def load_tile(ptr, row, k, rows, inner, row_stride, k_stride):
    """(BLOCK, DEPTH), zeros outside."""
    at = ptr + row.to(tl.int64)[:, None] * row_stride + k.to(tl.int64)[None, :] * k_stride
    value = tl.load(at, mask=(row < rows)[:, None] & (k < inner)[None, :], other=0.0)
    return value.to(tl.float32) if INTERPRETED else value


@triton.jit
def symmetric_kernel(
    left_ptr,  # (B, rows, inner)
    right_ptr,  # (B, rows, inner)
    plus_ptr,  # (B, rows, rows) contiguous, or None
    out_ptr,  # (B, rows, rows) contiguous
    rows,
    inner,
    pairs,  # of tiles, a matrix
    left_batch,
    left_row,
    left_k,
    right_batch,
    right_row,
    right_k,
    scale,
    times,
    diagonal,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    matrix = tl.cast(tl.program_id(0) // pairs, tl.int64)
    tile_row, tile_column = tile_pair(tl.program_id(0) % pairs)
    row = tile_row * BLOCK + tl.arange(0, BLOCK)
    column = tile_column * BLOCK + tl.arange(0, BLOCK)
    left_ptr += matrix * left_batch
    right_ptr += matrix * right_batch
    total = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for begin in tl.range(0, inner, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        left = load_tile(left_ptr, row, k, rows, inner, left_row, left_k)
        right = load_tile(right_ptr, column, k, rows, inner, right_row, right_k)
        total = tl.dot(left, tl.trans(right), total)

    base = matrix * rows * rows
    at = base + row.to(tl.int64)[:, None] * rows + column[None, :]
    inside = (row < rows)[:, None] & (column < rows)[None, :]
    total = total * scale
    if plus_ptr is not None:
        total += times * tl.load(plus_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.where(row[:, None] == column[None, :], diagonal, 0.0)
    value = total.to(out_ptr.dtype.element_ty)
    mirrored = tl.trans(value)
    if tile_row == tile_column:
        value = tl.where(row[:, None] >= column[None, :], value, mirrored)
        tl.store(out_ptr + at, value, mask=inside)
    else:
        tl.store(out_ptr + at, value, mask=inside)
        at = base + column.to(tl.int64)[:, None] * rows + row[None, :]
        inside = (column < rows)[:, None] & (row < rows)[None, :]
        tl.store(out_ptr + at, mirrored, mask=inside)


class Blocks(NamedTuple):
    """How the kernel cuts its work, and what a program is given for it."""

    tile: int
    depth: int
    warps: int
    stages: int


# 128 x 128 sums in float32 are 64 registers a thread of 8 warps. Hopper and datacentre Blackwell:
# matrix units read operands from shared memory, of which three stages take 96 KB. On the others
# operands pass through registers, and of more than 32 numbers of a row some would spill.
LARGE = {9: Blocks(128, 64, 8, 3), 10: Blocks(128, 64, 8, 3)}
LARGE_ELSEWHERE = Blocks(128, 32, 8, 4)
LARGE_FROM = 1024  # rows, which are 36 pairs of large tiles; with fewer, too few to share out
SMALL = Blocks(64, 64, 4, 3)
ODD = Blocks(64, 32, 8, 2)  # where each element has an address and a mask of its own
ALIGNED = 16  # elements, by which Triton takes addresses together
# Few programs and few steps: the interpreter takes 20 ms for one.
INTERPRETED_BLOCKS = Blocks(64, 64, 1, 1)


def blocks_for(capability: tuple[int, int], rows: int, inner: int) -> Blocks:
    """The blocks of a product of `rows` rows and sums of `inner` terms, on a GPU of that compute
    capability."""
    if rows % ALIGNED or inner % ALIGNED:
        return ODD
    if rows < LARGE_FROM:
        return SMALL
    return LARGE.get(capability[0], LARGE_ELSEWHERE)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _blocks(left: Tensor) -> Blocks:
    if left.device.type != "cuda":
        return INTERPRETED_BLOCKS
    return blocks_for(_capability(left.device), *left.shape[1:])


def iterates(dtype: torch.dtype) -> torch.dtype:
    """The dtype that X is kept in between steps."""
    return torch.float16


def unsupported(problem: Problem) -> str | None:
    """The reason why the Triton kernel can't serve `problem`, or None."""
    interpreted = not isinstance(symmetric_kernel, triton.JITFunction)
    if (reason := launcher.why_not_on(problem.device, interpreted=interpreted)) is not None:
        return reason
    if problem.dtype == torch.float64:
        return f"computes in float16 and float32, not {short(torch.float64)}"
    return None


def symmetric(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    scale: float = 1.0,
    plus: Tensor | None = None,
    times: float = 0.0,
    diagonal: float = 0.0,
) -> None:
    """As forms.Symmetric."""
    count, rows, inner = left.shape
    blocks = _blocks(left)
    tiles = triton.cdiv(rows, blocks.tile)
    pairs = tiles * (tiles + 1) // 2
    with torch.cuda.device_of(left):
        symmetric_kernel[(count * pairs,)](
            left,
            right,
            plus,
            out,
            rows,
            inner,
            pairs,
            *left.stride(),
            *right.stride(),
            scale,
            times,
            diagonal,
            BLOCK=blocks.tile,
            DEPTH=blocks.depth,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


PRODUCTS = Products(symmetric, library_wide)


def forward(matrices: Tensor, steps: int, coefficients: Coefficients, method: str) -> Tensor:
    """As reference.forward."""
    x = torch.empty(matrices.shape, dtype=iterates(matrices.dtype), device=matrices.device)
    torch.div(matrices, reference.norms(matrices), out=x)
    return iterate(x, steps, coefficients, method, PRODUCTS).to(matrices.dtype)
