"""A step of an optimizer: one call for all tensors that are kept alike."""

import torch

from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.optimizer_step.reference import Problem
from fasttrain_kernels.ops.optimizer_step.step import Step
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import Candidate

FOLDER = "fasttrain_kernels.ops.optimizer_step"
NAME = "optimizer_step"


def describe(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype | None = None,
    algorithm: str = "adamw",
    rounding: str | None = None,
    moments: str = "float32",
    rows: int = 0,
) -> Problem:
    """The problem of a step of `rows` elements in all.

    grad_dtype: None for dtype. rounding: None for "none" with float32 and float64, else "master".
    """
    if rounding is None:
        rounding = "none" if dtype in (torch.float32, torch.float64) else "master"
    return Problem(
        torch.device(device),
        dtype,
        grad_dtype or dtype,
        algorithm,
        rounding,
        moments,
        rounded(rows),
    )


OPTIMIZER_STEP = Op(
    NAME,
    candidates=(
        Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
        Candidate("cuda", f"{FOLDER}.cuda_kernel", devices=("cuda",), isolated=True),
    ),
    folder=FOLDER,
    describe=describe,
    example={},
)


def optimizer_step(work: Step, *, backend: str = "auto") -> None:
    """Step the slots of `work` in place. Formulas: ops/optimizer_step/reference.py.

    The optimizers of fasttrain_kernels.optim are the way to use it. Raises UnsupportedKernel where
    the backend asked for can't serve. A backend that fails has written who knows what: the call is
    not made again elsewhere, and the error says so.
    """
    if not work.slots:
        return
    first = work.slots[0]
    problem = Problem(
        first.param.device,
        first.param.dtype,
        first.grad.dtype,
        work.algorithm,
        work.rounding,
        work.moments,
        rounded(sum(slot.param.numel() for slot in work.slots)),
    )
    OPTIMIZER_STEP.run("step", problem, backend, lambda kernel: kernel.step(work), repeatable=False)
