# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""An embedding in Triton, for CUDA devices from compute capability 8.0.

Backward sorts the tokens by their rows and cuts what is sorted into chunks of CHUNK places,
wherever rows begin. A *piece* is what one row has in one chunk, and is one program's sum; it is
written to dweight where the row has no other, else to a partial sum. A second kernel adds up the
partial sums of each such row. So a token that occurs 4096 times is 256 sums of 16, then one of 256;
the order is fixed, there are no atomics, and nothing is asked of the device on the way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels import checks, launcher
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.embedding import reference
from fasttrain_kernels.ops.embedding.reference import Problem

CHUNK = 16  # places; also the partial sums that are loaded at once
WARPS = 4


@triton.jit
def forward_kernel(ids_ptr, weight_ptr, y_ptr, rows, width, weight_stride, BLOCK: tl.constexpr):
    token = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    known = (row >= 0) & (row < rows)
    at = weight_ptr + row * weight_stride + column
    value = tl.load(at, mask=known & (column < width), other=float("nan"))
    tl.store(y_ptr + token * width + column, value, mask=column < width)


@triton.jit
def sum_pieces_kernel(
    dy_ptr,
    owners_ptr,  # (tokens,): the row of each place, in order; `rows`: none
    tokens_ptr,  # (tokens,): the token at each place
    dweight_ptr,
    partial_ptr,  # (chunks, 2, width): a piece from the chunk's start, and one that starts later
    tokens,
    rows,
    width,
    dy_stride,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    chunk = tl.cast(place // CHUNK, tl.int64)
    offset = place % CHUNK
    row = tl.load(owners_ptr + place)
    before = tl.load(owners_ptr + place - 1, mask=place > 0, other=-1)
    if (row < rows) & ((offset == 0) | (before != row)):  # else not the first of a piece
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        step = tl.arange(0, CHUNK)[:, None]
        mine = (offset + step < CHUNK) & (place + step < tokens)
        mine = mine & (tl.load(owners_ptr + place + step, mask=mine, other=-1) == row)
        token = tl.load(tokens_ptr + place + step, mask=mine, other=0)
        at = dy_ptr + token * dy_stride + column[None, :]
        dy = tl.load(at, mask=mine & (column < width)[None, :], other=0.0).to(tl.float32)
        total = tl.sum(dy, axis=0)

        end = place - offset + CHUNK
        after = tl.load(owners_ptr + end, mask=end < tokens, other=-1)
        if (before != row) & (after != row):
            out = dweight_ptr + tl.cast(row, tl.int64) * width + column
            tl.store(out, total.to(dweight_ptr.dtype.element_ty), mask=column < width)
        else:
            slot = 2 * chunk + tl.where(offset == 0, 0, 1)
            tl.store(partial_ptr + slot * width + column, total, mask=column < width)


@triton.jit
def add_pieces_kernel(
    owners_ptr,
    partial_ptr,
    dweight_ptr,
    tokens,
    rows,
    width,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.cast(tl.program_id(0), tl.int64)
    begin, end = chunk * CHUNK, (chunk + 1) * CHUNK
    row = tl.load(owners_ptr + end - 1, mask=end < tokens, other=rows)
    before = tl.load(owners_ptr + begin - 1, mask=begin > 0, other=-1)
    after = tl.load(owners_ptr + end, mask=end < tokens, other=-1)
    if (row < rows) & (before != row) & (after == row):  # the row begins here and ends elsewhere
        # Where it ends is looked for first: Triton 3.7 can't compile a `while` that carries a sum.
        last = chunk
        while after == row:
            last += CHUNK
            at = (last + 1) * CHUNK
            after = tl.load(owners_ptr + at, mask=at < tokens, other=-1)

        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        slot = 2 * chunk + tl.where(tl.load(owners_ptr + begin) == row, 0, 1)
        inside = column < width
        total = tl.load(partial_ptr + slot * width + column, mask=inside, other=0.0)
        for first in range(chunk + 1, last + 1, CHUNK):
            piece = first + tl.arange(0, CHUNK)[:, None]
            mine = piece * CHUNK < tokens
            mine = mine & (tl.load(owners_ptr + piece * CHUNK, mask=mine, other=-1) == row)
            partial = partial_ptr + 2 * piece * width + column[None, :]
            total += tl.sum(tl.load(partial, mask=mine & inside[None, :], other=0.0), axis=0)
        out = dweight_ptr + tl.cast(row, tl.int64) * width + column
        tl.store(out, total.to(dweight_ptr.dtype.element_ty), mask=inside)


def unsupported(problem: Problem) -> str | None:
    """The reason why the Triton kernels can't serve `problem`, or None."""
    interpreted = not isinstance(forward_kernel, triton.JITFunction)
    if (reason := launcher.why_not_on(problem.device, interpreted=interpreted)) is not None:
        return reason
    if problem.dtype == torch.float64:
        return f"computes in float32, not {short(torch.float64)}"
    return None


def block_width(width: int, most: int) -> int:
    """Columns of a program's tile."""
    return min(most, triton.next_power_of_2(width))


MOST_FORWARD, MOST_BACKWARD = 2048, 256  # columns: 16 elements a thread, and 32


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    """As reference.forward."""
    weight = checks.rows(weight)
    rows, width = weight.shape
    y = weight.new_empty(ids.shape[0], width)
    block = block_width(width, MOST_FORWARD)
    if ids.shape[0] > 0:
        with torch.cuda.device_of(weight):
            forward_kernel[(ids.shape[0], triton.cdiv(width, block))](
                ids.contiguous(),
                weight,
                y,
                rows,
                width,
                weight.stride(0),
                BLOCK=block,
                num_warps=WARPS,
            )
    return y


def backward(dy: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """As reference.backward."""
    count, width = dy.shape
    dweight = dy.new_zeros(rows, width)
    if count == 0:
        return dweight
    # A place per token, and int32 keys, which radix sort goes over in half the passes of int64.
    owners, tokens = torch.sort(reference.owners(ids, rows, padding_idx), stable=True)
    chunks = triton.cdiv(count, CHUNK)
    partials = dy.new_empty(chunks, 2, width, dtype=torch.float32)
    block = block_width(width, MOST_BACKWARD)
    blocks = triton.cdiv(width, block)
    shape = {"CHUNK": CHUNK, "BLOCK": block, "num_warps": WARPS}
    with torch.cuda.device_of(dy):
        sum_pieces_kernel[(count, blocks)](
            dy, owners, tokens, dweight, partials, count, rows, width, dy.stride(0), **shape
        )
        add_pieces_kernel[(chunks, blocks)](owners, partials, dweight, count, rows, width, **shape)
    return dweight
