"""The norm of all gradients in CUDA C++ (csrc/cuda/optimizer.cu): one launch, in a fixed order.

The order is that of 2048 parts on every device: the same bits every time, and on every GPU.
"""

from fasttrain_kernels import native
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.grad_norm.native_norm import SERVED, norm
from fasttrain_kernels.ops.grad_norm.reference import Problem

__all__ = ["norm", "unsupported"]


def unsupported(problem: Problem) -> str | None:
    """The reason why the CUDA kernel can't serve `problem`, or None."""
    if problem.device.type != "cuda":
        return f"runs on CUDA devices; the tensors are on {problem.device.type}"
    if problem.dtype not in SERVED:
        return f"serves {', '.join(map(short, SERVED))}, not {short(problem.dtype)}"
    return native.cuda_why_not(problem.device)
