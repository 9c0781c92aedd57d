"""Steps of optimizers in C++, on CPUs."""

from fasttrain_kernels import native
from fasttrain_kernels.ops.optimizer_step.native_step import run, why_not
from fasttrain_kernels.ops.optimizer_step.reference import Problem
from fasttrain_kernels.ops.optimizer_step.step import Step


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    if problem.device.type != "cpu":
        return f"runs on CPUs; the tensors are on {problem.device.type}"
    return why_not(problem) or native.why_not("_C_cpu")


def step(work: Step) -> None:
    """As reference.step."""
    run(work)
