"""Steps of optimizers in CUDA C++ (csrc/cuda/optimizer.cu): one launch for all tensors of a call.

Nothing waits for the device, and calls may be captured in CUDA graphs. Bitwise repeatable.
"""

from fasttrain_kernels import native
from fasttrain_kernels.ops.optimizer_step.native_step import run, why_not
from fasttrain_kernels.ops.optimizer_step.reference import Problem
from fasttrain_kernels.ops.optimizer_step.step import Step


def unsupported(problem: Problem) -> str | None:
    """The reason why the CUDA kernel can't serve `problem`, or None."""
    if problem.device.type != "cuda":
        return f"runs on CUDA devices; the tensors are on {problem.device.type}"
    return why_not(problem) or native.cuda_why_not(problem.device)


def step(work: Step) -> None:
    """As reference.step."""
    run(work)
