"""Small fixed problems on which a backend of embedding is compared with exact values."""

from types import ModuleType

import torch

from fasttrain_kernels import testing_embedding
from fasttrain_kernels.ops.embedding.reference import NO_PADDING, Problem

# Tokens, rows, width: one of each, an odd width, more columns than a tile of Triton's backward.
SHAPES = ((1, 1, 1), (35, 9, 63), (5, 3, 300))
DTYPES = (torch.float32, torch.bfloat16)


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error of forward and backward in units of what is allowed: right is at most 1.

    Covers what `kernel` serves of these dtypes and shapes, with a padding row for bfloat16.
    """
    worst = 0.0
    for dtype in DTYPES:
        for tokens, rows, width in SHAPES:
            if kernel.unsupported(Problem(device, dtype, width)) is None:
                padding_idx = rows - 1 if dtype == torch.bfloat16 else NO_PADDING
                shape = (tokens, rows, width, padding_idx)
                worst = max(worst, _one(kernel, device, dtype, *shape, truncating))
    return worst


def _one(
    kernel: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    rows: int,
    width: int,
    padding_idx: int,
    truncating: bool,
) -> float:
    generator = torch.Generator().manual_seed(tokens * 7919 + width)
    # Half of the tokens are one id, so that its sum goes over several chunks.
    ids = torch.randint(rows, (tokens,), generator=generator)
    ids[::2] = 0
    weight = torch.randn(rows, width, generator=generator).to(dtype)
    dy = torch.randn(tokens, width, generator=generator).to(dtype)
    expected = testing_embedding.embedding_expected(
        ids, weight, dy, padding_idx, truncating=truncating
    )
    on_device = ids.to(device)
    y = kernel.forward(on_device, weight.to(device))
    dweight = kernel.backward(dy.to(device), on_device, rows, padding_idx)
    return max(expected["y"].ratio(y), expected["dweight"].ratio(dweight))
