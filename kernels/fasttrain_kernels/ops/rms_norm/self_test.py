"""Small fixed problems on which a backend of rms_norm is compared with exact values."""

from types import ModuleType

import torch

from fasttrain_kernels import testing
from fasttrain_kernels.ops.rms_norm import reference
from fasttrain_kernels.ops.rms_norm.reference import Problem

EPS = 1e-6
# Rows and widths: a tile with room to spare, several tiles, an odd width, one that fills its tile.
SHAPES = ((1, 24), (37, 96), (5, 1001), (3, 2048))
DTYPES = (  # of the input, of the weight
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error of forward and backward in units of what is allowed: right is at most 1.

    Covers what `kernel` serves of these dtypes, shapes and styles, with and without a residual.
    """
    worst = 0.0
    for dtype, weight_dtype in DTYPES:
        for shape in SHAPES:
            for style in reference.STYLES:
                for has_residual in (False, True):
                    residual_dtype = dtype if has_residual else None
                    problem = Problem(device, dtype, shape[1], weight_dtype, residual_dtype, style)
                    if kernel.unsupported(problem) is None:
                        worst = max(worst, _one(kernel, problem, shape[0], truncating))
    return worst


def _one(kernel: ModuleType, problem: Problem, rows: int, truncating: bool) -> float:
    device, dtype, width, weight_dtype, residual_dtype, style, _ = problem
    generator = torch.Generator().manual_seed(rows * 7919 + width)

    def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    x, weight = normal(rows, width, dtype=dtype), normal(width, dtype=weight_dtype)
    residual = None if residual_dtype is None else normal(rows, width, dtype=residual_dtype)
    y_dtype = reference.output_dtype(dtype, residual_dtype, weight_dtype, style)
    dy = normal(rows, width, dtype=y_dtype)
    dsum = None if residual is None else normal(rows, width, dtype=dtype)

    y, total, rstd = kernel.forward(x, weight, EPS, residual, style)
    s = x if residual is None else total
    dx, dweight = kernel.backward(dy, dsum, s, weight, rstd, style, True, True)
    expected = testing.rms_norm_expected(
        s, weight, EPS, style, dy=dy, dsum=dsum, output_dtype=y_dtype, truncating=truncating
    )
    found = {"y": y, "dx": dx, "dweight": dweight}
    return max(expected[name].ratio(found[name]) for name in found)
