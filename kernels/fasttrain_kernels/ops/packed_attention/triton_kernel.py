"""Packed attention in Triton, for CUDA devices from compute capability 8.0.

The tile table (tiles.py) says what there is to do; how a block is computed is in triton_blocks.py,
triton_forward.py and triton_backward.py. Sums are in float32; p and ds are rounded to the inputs'
dtype before they are multiplied. Grids follow from shapes, so that nothing waits for the device.

Nothing crosses programs, so results are bitwise repeatable. A document's are the same alone and
among others: every block begins at a fixed place of the document or, where short ones share a tile,
holds it where a tree of sums and the steps of a matrix unit add exact zeros to it. inf and NaN stay
in their document.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fasttrain_kernels import launcher
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.packed_attention.providers import values_differ
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask, Problem
from fasttrain_kernels.ops.packed_attention.tiles import TILE, tile_table
from fasttrain_kernels.ops.packed_attention.triton_backward import keys_kernel, queries_kernel
from fasttrain_kernels.ops.packed_attention.triton_blocks import LOG2E
from fasttrain_kernels.ops.packed_attention.triton_forward import forward_kernel

MAX_WIDTH = 256


class Blocks(NamedTuple):
    """How a kernel cuts its work, and what a program is given for it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Configuration(NamedTuple):
    forward: Blocks
    queries: Blocks  # dq
    keys: Blocks  # dk and dv


# By the width that heads are padded to, at most. Chosen so that nothing spills out of 255 registers
# a thread in the forms that tests/ops/test_gpu_gate_packed_attention.py compiles. (One that it
# doesn't is known to: dk and dv of float16 heads of 80 where all see all, 24 bytes on Hopper.)
# 128 x 128 numbers in float32 are 64 registers a thread of 8 warps: one such sum in the forward
# pass and for dq, two for dk and dv.
#
# Hopper and datacentre Blackwell: matrix units read both operands from shared memory, of 227 KB.
LARGE = {
    64: Configuration(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    128: Configuration(Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2)),
    256: Configuration(Blocks(128, 32, 8, 2), Blocks(64, 16, 8, 2), Blocks(32, 32, 8, 2)),
}
# The others: operands pass through registers, and 99 KB of shared memory are what all have.
SMALL = {
    64: Configuration(Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 128, 8, 2)),
    128: Configuration(Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(64, 64, 8, 2)),
    256: Configuration(Blocks(64, 16, 8, 2), Blocks(64, 16, 8, 2), Blocks(32, 32, 8, 2)),
}
# float32 is multiplied without matrix units, as exactly as it is added.
FLOAT32 = {
    64: Configuration(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
    128: Configuration(Blocks(32, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2)),
    256: Configuration(Blocks(16, 16, 4, 2), Blocks(32, 16, 8, 2), Blocks(16, 16, 4, 1)),
}
# Few programs and few steps: the interpreter takes 20 ms for one.
INTERPRETED = Configuration(Blocks(128, 128, 1, 1), Blocks(128, 64, 1, 1), Blocks(64, 128, 1, 1))


def configuration(capability: tuple[int, int], width: int, dtype: torch.dtype) -> Configuration:
    """The blocks of the three kernels, on a GPU of that compute capability."""
    table = LARGE if capability[0] in (9, 10) else SMALL
    if dtype == torch.float32:
        table = FLOAT32
    return next(found for limit, found in table.items() if width <= limit)


def unsupported(problem: Problem) -> str | None:
    """The reason why the Triton kernels can't serve `problem`, or None."""
    interpreted = not isinstance(forward_kernel, triton.JITFunction)
    if (reason := launcher.why_not_on(problem.device, interpreted=interpreted)) is not None:
        return reason
    if problem.dtype == torch.float64:
        return f"computes in float32, not {short(torch.float64)}"
    if problem.value_dim != problem.head_dim:
        return values_differ(problem)
    if problem.head_dim > MAX_WIDTH:
        return f"serves heads of up to {MAX_WIDTH} elements; these have {problem.head_dim}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, mask: Mask, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    tokens, heads, _ = q.shape
    o = q.new_empty(q.shape)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    tiles = _tiles(documents)
    blocks = _configuration(q).forward
    with torch.cuda.device_of(q):
        forward_kernel[_grid(tiles, blocks.queries, heads)](
            q,
            k,
            v,
            sinks,
            tiles,
            o,
            lse,
            tokens,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *_scores(mask, tokens),
            HEADS=heads,
            **_shape(q, k, mask, blocks),
        )
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    documents: Documents,
    mask: Mask,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.backward."""
    tokens, heads, _ = q.shape
    tiles = _tiles(documents)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    strides = [stride for t in (do, q, k, v) for stride in t.stride()[:2]]
    _, of_queries, of_keys = _configuration(q)
    grid = _grid(tiles, of_queries.queries, heads)
    partials = None if sinks is None else lse.new_empty(grid[0] // heads, heads)
    with torch.cuda.device_of(q):
        queries_kernel[grid](
            do,
            q,
            k,
            v,
            o.contiguous(),
            lse,
            sinks,
            tiles,
            dq,
            delta,
            partials,
            tokens,
            *strides,
            mask.scale,
            *_scores(mask, tokens),
            HEADS=heads,
            **_shape(q, k, mask, of_queries),
        )
        keys_kernel[_grid(tiles, of_keys.keys, k.shape[1])](
            do,
            q,
            k,
            v,
            lse,
            delta,
            tiles,
            dk,
            dv,
            tokens,
            *strides,
            mask.scale,
            *_scores(mask, tokens),
            HEADS=k.shape[1],
            **_shape(q, k, mask, of_keys),
        )
    if sinks is None or partials is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, partials.sum(0).to(sinks.dtype)


def _configuration(q: Tensor) -> Configuration:
    if q.device.type != "cuda":
        return INTERPRETED
    return configuration(_capability(q.device), q.shape[2], q.dtype)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _tiles(documents: Documents) -> Tensor:
    if documents.tiles is not None:
        return documents.tiles
    return tile_table(documents.offsets).to(documents.cu_seqlens.device)


def _grid(tiles: Tensor, rows: int, heads: int) -> tuple[int]:
    return (tiles.shape[0] * (TILE // rows) * heads,)


def _scores(mask: Mask, tokens: int) -> tuple[float, float | None, int | None]:
    """factor, cap and window: a score is factor * q . k, or cap * tanh of that, in units of
    log2(e). A window that hides nothing is none."""
    window = mask.window if mask.window is not None and mask.window < tokens else None
    if mask.softcap is None:
        return mask.scale * LOG2E.value, None, window
    return mask.scale / mask.softcap, mask.softcap * LOG2E.value, window


def _shape(q: Tensor, k: Tensor, mask: Mask, blocks: Blocks) -> dict[str, int | bool]:
    """The keyword arguments that kernels have in common."""
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "CAUSAL": mask.causal,
        "WIDTH": q.shape[2],
        "BLOCK_WIDTH": max(16, triton.next_power_of_2(q.shape[2])),
        "QUERIES": blocks.queries,
        "KEYS": blocks.keys,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
