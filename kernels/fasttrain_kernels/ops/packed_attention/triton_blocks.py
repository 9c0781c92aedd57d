# Triton takes annotations for types of its own, so kernels carry none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of packed attention do with one block of tokens: device functions.

A program owns a block of rows of a tile, queries or keys, and walks over blocks of the others,
keys or queries, by their position in the document: first those of which all see all, without a
mask, then those on an edge of the causal triangle, of the window or of the document. Positions
count from the document's beginning, so where it lies among others changes no operation.

In a shared tile the others are rows of the same half of it, and inf and NaN are kept from what
doesn't see them.
"""

import triton
import triton.language as tl

from fasttrain_kernels.ops.packed_attention import tiles

TILE = tl.constexpr(tiles.TILE)
SLOT = tl.constexpr(tiles.SLOT)
SHARED_LENGTH = tl.constexpr(tiles.SHARED_LENGTH)
FIRST = tl.constexpr(tiles.FIRST)
LENGTH = tl.constexpr(tiles.LENGTH)
BEGIN = tl.constexpr(tiles.BEGIN)
SHARED = tl.constexpr(tiles.SHARED)
BY_KEYS = tl.constexpr(tiles.BY_KEYS)
SLOT_TOKEN = tl.constexpr(tiles.SLOT_TOKEN)
SLOT_BEGIN = tl.constexpr(tiles.SLOT_BEGIN)
SLOT_END = tl.constexpr(tiles.SLOT_END)
COLUMNS = tl.constexpr(tiles.COLUMNS)

# Triton's interpreter multiplies no bfloat16, so there products are of float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PRECISION = tl.constexpr("ieee")  # of float32: three products of tf32 take twice the registers
NOWHERE = tl.constexpr(2**31 - 1)  # the token of a row that has none
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# ---- which rows ----------------------------------------------------------------------------------


@triton.jit
def own_rows(tile_ptr, row, window, BACK: tl.constexpr, AHEAD: tl.constexpr):
    """Of rows of a tile: their tokens, the tokens from `lower` to below `upper` that they have to
    do with, and whether there is a token."""
    slot_ptr = tile_ptr + row // SLOT
    token = tl.load(slot_ptr + SLOT_TOKEN) + row % SLOT
    lower = tl.load(slot_ptr + SLOT_BEGIN)
    end = tl.load(slot_ptr + SLOT_END)
    upper = end
    if not BACK:
        lower = token
    elif window is not None:
        lower = tl.maximum(lower, token - window + 1)
    if not AHEAD:
        upper = token + 1
    elif window is not None:
        upper = tl.minimum(upper, token + window)
    return token, lower, upper, token < end


@triton.jit
def edge_positions(number, low, inner, blocks, BLOCK: tl.constexpr):
    """Of the edge block of that number: those before the inner blocks come first, then those
    after."""
    position = low + number * BLOCK
    position = tl.where(position < inner, position, position + blocks * BLOCK)
    return position + tl.arange(0, BLOCK)


@triton.jit
def shared_rows(tile_ptr, row):
    """Of rows of a shared tile: their tokens, and what they are to be compared by."""
    slot_ptr = tile_ptr + row // SLOT
    token = tl.load(slot_ptr + SLOT_TOKEN) + row % SLOT
    inside = token < tl.load(slot_ptr + SLOT_END)
    return token, inside, tl.where(inside, token, NOWHERE)


@triton.jit
def reach(
    tile_ptr,
    row,
    window,
    BACK: tl.constexpr,
    AHEAD: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The positions with which rows `row` to row + OWN of a tile have to do, in whole blocks.

    BACK, AHEAD: with earlier and with later ones; window: with those nearer than that alone.
    Returns where they begin; how many blocks are on an edge, and how many are of a shared tile;
    where those between that are on none begin, and how many there are.
    """
    length = tl.load(tile_ptr + LENGTH)
    first = tl.load(tile_ptr + FIRST) + row
    low, inner = 0, 0  # the first that one of the rows has to do with, and that all have
    if not BACK:
        low, inner = first, first + OWN - 1
    elif window is not None:
        low, inner = tl.maximum(first - window + 1, 0), tl.maximum(first + OWN - window, 0)
    outer, high = length, length  # the end of those that all have to do with, and that one has
    if not AHEAD:
        outer, high = first + 1, tl.minimum(first + OWN, length)
    elif window is not None:
        outer = tl.minimum(first + window, length)
        high = tl.minimum(first + OWN - 1 + window, length)
    shared = 0
    if tl.load(tile_ptr + SHARED) != 0:  # a short document lies in one half of the tile
        low = row // SHARED_LENGTH * SHARED_LENGTH // BLOCK * BLOCK
        inner, outer, high = low, low, low
        shared = (tl.maximum(SHARED_LENGTH, row + OWN - low) + BLOCK - 1) // BLOCK
    low = low // BLOCK * BLOCK
    inner = (tl.minimum(inner, high) + BLOCK - 1) // BLOCK * BLOCK
    outer = tl.maximum(outer // BLOCK * BLOCK, inner)
    edges = (inner - low) // BLOCK + (high - outer + BLOCK - 1) // BLOCK
    return low, edges, shared, inner, (outer - inner) // BLOCK


# ---- what is in them -----------------------------------------------------------------------------


@triton.jit
def load_rows(ptr, row, stride, inside, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """(rows, BLOCK_WIDTH), zeros beyond WIDTH and in rows that are not inside (None: all are)."""
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    at = ptr + tl.cast(row, tl.int64)[:, None] * stride + column
    mask = column < WIDTH
    if inside is not None:
        mask = mask & inside[:, None]
    if inside is None and WIDTH == BLOCK_WIDTH:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=mask, other=0.0)
    return value.to(tl.float32) if INTERPRETED else value


@triton.jit
def store_rows(ptr, row, stride, inside, value, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    at = ptr + tl.cast(row, tl.int64)[:, None] * stride + column
    mask = inside[:, None] & (column < WIDTH)
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def nan_rows(value):
    """NaN for the rows of which some are inf or NaN, 0 for the others."""
    finite = tl.abs(value.to(tl.float32)) < float("inf")
    return tl.where(tl.max(tl.where(finite, 0.0, 1.0), 1) > 0.0, float("nan"), 0.0)


@triton.jit
def rounded(value, ELEMENT: tl.constexpr):
    """As a product takes it: in the inputs' dtype."""
    value = value.to(ELEMENT)
    return value.to(tl.float32) if INTERPRETED else value
