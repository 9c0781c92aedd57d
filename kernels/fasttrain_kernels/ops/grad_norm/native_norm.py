"""What the C++ and the CUDA kernel share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain_kernels.ops.optimizer_step.table import NORM_WORKSPACE, Table

SERVED = (torch.float32, torch.bfloat16)


def norm(gradients: Sequence[Tensor], table: Table) -> Tensor:
    """As reference.norm."""
    out = torch.empty((), dtype=torch.float32, device=gradients[0].device)
    rows = table.of_gradients(gradients)
    torch.ops.fasttrain_native.grad_norm(rows, out, table.workspace(NORM_WORKSPACE))
    return out
