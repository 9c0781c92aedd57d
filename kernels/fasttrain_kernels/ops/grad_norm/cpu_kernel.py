"""The norm of all gradients in C++, on CPUs: one pass over each, in blocks of a fixed order."""

from fasttrain_kernels import native
from fasttrain_kernels.ops.grad_norm.native_norm import SERVED, norm
from fasttrain_kernels.ops.grad_norm.reference import Problem

__all__ = ["norm", "unsupported"]


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    return native.cpu_why_not(problem.device, problem.dtype, SERVED)
