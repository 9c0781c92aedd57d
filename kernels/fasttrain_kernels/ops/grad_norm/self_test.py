"""Small fixed gradients on which a backend of grad_norm is compared with exact values."""

from types import ModuleType

import torch

from fasttrain_kernels.ops.grad_norm.reference import Problem
from fasttrain_kernels.ops.optimizer_step.table import Table
from fasttrain_kernels.testing_optimizer import norm_expected

# Elements of each tensor: nothing, one, an odd number, more than a unit of work.
SIZES = (0, 1, 1051, 16500)
DTYPES = (torch.float32, torch.bfloat16)


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error in units of what is allowed: right is at most 1. Dtypes, and a mixture."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator) * 10.0**-i for i, size in enumerate(SIZES)]
    worst = 0.0
    for dtype in DTYPES:
        if kernel.unsupported(Problem(device, dtype)) is None:
            # float32 stands for a mixture too.
            others = [dtype, torch.bfloat16 if dtype == torch.float32 else dtype]
            for other in others:
                mixed = [t.to(device, other if i % 2 else dtype) for i, t in enumerate(drawn)]
                worst = max(worst, norm_expected(mixed).ratio(kernel.norm(mixed, Table())))
    return worst
