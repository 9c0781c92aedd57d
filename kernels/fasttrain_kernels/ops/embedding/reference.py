"""Rows of a table by their numbers, the definition: plain PyTorch.

Forward, for each token t with the id v:
    y[t] = weight[v]; NaN where the table has no row v
Backward:
    dweight[v] = sum of dy[t] over the tokens t with the id v, 0 for v = padding_idx
formed in float32 (float64 for float64) and rounded once. A token whose id is no row is in no sum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NO_PADDING = -1


class Problem(NamedTuple):
    """The facts that decide which backend can serve a call."""

    device: torch.device
    dtype: torch.dtype
    width: int
    vocabulary: int = 0  # rows of the table
    rows: int = 0  # ids; a power of two


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that gradients are added in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def owners(ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """The row of dweight that each token adds to, int32; `rows` for a token that adds to none."""
    counts = (ids >= 0) & (ids < rows) & (ids != padding_idx)
    return torch.where(counts, ids, rows).int()


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    """ids (N,), weight (V, H) -> y (N, H)."""
    known = (ids >= 0) & (ids < weight.shape[0])
    y = weight.index_select(0, torch.where(known, ids, 0))
    return y.masked_fill_(~known[:, None], torch.nan)


def backward(dy: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """dy (N, H), ids (N,) -> dweight (rows, H) of dy's dtype; padding_idx NO_PADDING: none."""
    wide = compute_dtype(dy.dtype)
    total = dy.new_zeros(rows + 1, dy.shape[1], dtype=wide)  # the last for what adds to no row
    # index_add_ would use atomics on a GPU; this sorts.
    total.index_put_((owners(ids, rows, padding_idx).long(),), dy.to(wide), accumulate=True)
    return total[:rows].to(dy.dtype)
