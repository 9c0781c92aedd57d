"""The norm of all gradients, the definition: sqrt of the sum of all elements' squares.

Each tensor's sum is formed in float64, and they are added up in their order. Infinite where it is
beyond float32, NaN where an element is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.ops.optimizer_step.table import Table


class Problem(NamedTuple):
    """The facts that decide which backend can serve a call."""

    device: torch.device
    dtype: torch.dtype  # float32 stands for a mixture with bfloat16
    rows: int = 0  # elements of all tensors; a power of two


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


@torch.no_grad()
def norm(gradients: Sequence[Tensor], table: Table) -> Tensor:
    """Contiguous tensors of one device -> () float32. table: of them, for kernels that read one."""
    squares = [gradient.double().square().sum() for gradient in gradients]
    return torch.stack(squares).sum().sqrt().float()
