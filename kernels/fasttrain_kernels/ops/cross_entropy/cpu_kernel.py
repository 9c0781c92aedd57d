"""Cross-entropy of rows of logits in C++ (csrc/cpu/cross_entropy*.cpp), on torch's threads.

A row is one thread's work, so the result is the same bits on any number of threads.
"""

import torch

from fasttrain_kernels import native
from fasttrain_kernels.ops.cross_entropy.native_rows import backward, forward, forward_backward
from fasttrain_kernels.ops.cross_entropy.reference import Problem

__all__ = ["backward", "forward", "forward_backward", "unsupported"]

SERVED = (torch.float32, torch.float64, torch.bfloat16)


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    return native.cpu_why_not(problem.device, problem.dtype, SERVED)
