"""Exact values of embedding in float64, and how far from them a backend may be.

y is a copy, and a sum of one gradient is too: neither may be off at all. A sum of n gradients makes
n - 1 roundings, of which the errors grow like sqrt(n), and one more where it is stored in a dtype
that is narrower than the sum.
"""

import torch
from torch import Tensor

from fasttrain_kernels.testing import ROUNDOFF, Expected


def embedding_expected(
    ids: Tensor, weight: Tensor, dy: Tensor, padding_idx: int = -1, *, truncating: bool = False
) -> dict[str, Expected]:
    """y (N, H) and dweight (V, H), for ids (N,) that are rows and dy (N, H); -1: no padding row.

    `truncating`: the backend rounds bfloat16 towards zero, as Triton's interpreter does.
    """
    wide = torch.float64
    ids, table, g = ids.detach().cpu().long(), weight.detach().cpu(), dy.detach().cpu().to(wide)
    y = table.to(wide)[ids]
    g = torch.where((ids == padding_idx)[:, None], 0.0, g)
    zeros = torch.zeros(table.shape, dtype=wide)
    value, size = (zeros.index_add(0, ids, each) for each in (g, g.abs()))
    count = torch.bincount(ids, minlength=len(table))[:, None]

    compute = ROUNDOFF[wide if weight.dtype == wide else torch.float32]
    roundings = torch.minimum(count, 2 + count.to(wide).sqrt())
    limit = compute * roundings * size
    if weight.dtype in (torch.bfloat16, torch.float16):
        limit += ROUNDOFF[weight.dtype] * (2 if truncating else 1) * value.abs()
    return {
        "y": Expected(y, torch.zeros_like(y)),
        "dweight": Expected(value, torch.where(count > 1, limit, 0.0)),
    }
