"""Small fixed matrices on which a backend of newton_schulz is compared with exact values."""

from types import ModuleType

import torch

from fasttrain_kernels.ops.newton_schulz.reference import QUINTIC, Problem
from fasttrain_kernels.testing_newton_schulz import newton_schulz_expected

# Matrices, rows, columns: one element; wide ones; a tall one of several tiles, none of them whole.
SHAPES = ((1, 1, 1), (2, 20, 33), (1, 130, 66))
# bfloat16 differs in how it is read and written.
CASES = (*((torch.float32, shape) for shape in SHAPES), (torch.bfloat16, SHAPES[1]))
STEPS = 4  # in the Gram form, two runs of several


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error in units of what is allowed: right is at most 1. Both methods."""
    worst = 0.0
    for method in ("direct", "gram"):
        for dtype, (number, rows, columns) in CASES:
            problem = Problem(device, dtype, method, *sorted((rows, columns)))
            if kernel.unsupported(problem) is None:
                generator = torch.Generator().manual_seed(rows)
                matrices = torch.randn(number, rows, columns, generator=generator).to(dtype)
                expected = newton_schulz_expected(
                    matrices, STEPS, QUINTIC, method, kernel.iterates(dtype), truncating
                )
                result = kernel.forward(matrices.to(device), STEPS, QUINTIC, method)
                worst = max(worst, expected.ratio(result))
    return worst
