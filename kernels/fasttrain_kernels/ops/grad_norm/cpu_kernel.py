"""The norm of all gradients in C++, on CPUs: one pass over each, in blocks of a fixed order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain_kernels import native
from fasttrain_kernels.ops.grad_norm.reference import Problem
from fasttrain_kernels.ops.optimizer_step.table import Table

SERVED = (torch.float32, torch.bfloat16)


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    return native.cpu_why_not(problem.device, problem.dtype, SERVED)


def norm(gradients: Sequence[Tensor], table: Table) -> Tensor:
    """As reference.norm."""
    out = torch.empty((), dtype=torch.float32, device=gradients[0].device)
    torch.ops.fasttrain_native.grad_norm(table.of_gradients(gradients), out)
    return out
