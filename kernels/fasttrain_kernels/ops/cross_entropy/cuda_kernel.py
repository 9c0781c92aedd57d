"""Cross-entropy in CUDA C++ (csrc/cuda/cross_entropy.cu), made for rows of many classes.

`forward_backward` reads a logit from memory once and writes its gradient once, for as many classes
as a block or a cluster of blocks can hold: on an H100 900 thousand in bfloat16, on an A100 80
thousand; what is beyond that is read again from the L2 cache. Bitwise repeatable on one device.
"""

import torch

from fasttrain_kernels import native
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.cross_entropy.native_rows import backward, forward, forward_backward
from fasttrain_kernels.ops.cross_entropy.reference import Problem

__all__ = ["backward", "forward", "forward_backward", "unsupported"]

SERVED = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(problem: Problem) -> str | None:
    """The reason why the CUDA kernels can't serve `problem`, or None."""
    if problem.device.type != "cuda":
        return f"runs on CUDA devices; the tensors are on {problem.device.type}"
    if problem.dtype not in SERVED:
        listed = ", ".join(short(dtype) for dtype in SERVED)
        return f"serves {listed}, not {short(problem.dtype)}"
    return native.cuda_why_not(problem.device)
