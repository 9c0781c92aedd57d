"""What the C++ and the CUDA kernel share: names as the numbers that csrc/common/optimizer.h has."""

import torch

from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.optimizer_step.reference import Problem
from fasttrain_kernels.ops.optimizer_step.step import Step
from fasttrain_kernels.ops.optimizer_step.table import STEP_WORKSPACE

ALGORITHMS = {"adamw": 0, "lion": 1, "sgd": 2}
ROUNDINGS = {"none": 0, "master": 1, "stochastic": 2, "kahan": 3}
MOMENTS = {"none": 0, "float32": 1, "bfloat16": 2, "8bit": 3}
GRADIENTS = (torch.float32, torch.bfloat16)


def why_not(problem: Problem) -> str | None:
    """Why neither kernel serves these dtypes, or None."""
    expected = torch.float32 if problem.rounding == "none" else torch.bfloat16
    if problem.dtype != expected:
        kept = "alone" if problem.rounding == "none" else f"with rounding {problem.rounding!r}"
        return f"serves {short(expected)} parameters {kept}, not {short(problem.dtype)}"
    if problem.grad_dtype not in GRADIENTS:
        served = ", ".join(map(short, GRADIENTS))
        return f"serves gradients of {served}, not {short(problem.grad_dtype)}"
    return None


def run(work: Step) -> None:
    """Step every slot in place."""
    torch.ops.fasttrain_native.optimizer_step(
        work.table.of(work.slots),
        work.numbers,
        ALGORITHMS[work.algorithm],
        ROUNDINGS[work.rounding],
        MOMENTS[work.moments],
        work.norm,
        work.max_norm,
        work.grad_scale,
        work.skip,
        work.seed,
        work.zero_grad,
        work.table.workspace(STEP_WORKSPACE),
    )
