"""Gated linear units in C++ (csrc/cpu/glu*.cpp): one pass, on torch's threads.

Elements don't depend on each other: the same bits, whatever the number of threads.
"""

import torch
from torch import Tensor

from fasttrain_kernels import native
from fasttrain_kernels.ops.swiglu.reference import Problem

SERVED = (torch.float32, torch.float64, torch.bfloat16)


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    return native.cpu_why_not(problem.device, problem.dtype, SERVED)


def forward(gate: Tensor, up: Tensor, activation: str, y: Tensor) -> None:
    """As reference.forward."""
    torch.ops.fasttrain_native.glu_forward(gate, up, activation, y)


def backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dgate: Tensor | None,
    dup: Tensor | None,
) -> None:
    """As reference.backward."""
    torch.ops.fasttrain_native.glu_backward(dy, gate, up, activation, dgate, dup)
