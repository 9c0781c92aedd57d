"""Gates to apply, and how models without a kernel do it; geglu's too."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fasttrain_kernels.ops.swiglu.op import swiglu
from fasttrain_kernels.ops.swiglu.reference import Problem
from fasttrain_kernels.workload import Drawn, Workload


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of `rows` rows, in two tensors."""
    return gated(problem, rows, swiglu, F.silu)


def gated(
    problem: Problem,
    rows: int,
    op: Callable[..., Tensor],
    activation: Callable[[Tensor], Tensor],
) -> Workload:
    """The same for any activation."""
    drawn, shape = Drawn(problem.device), (rows or problem.rows, problem.width)
    gate, up = (drawn.leaf(*shape, dtype=problem.dtype) for _ in range(2))
    return Workload(
        lambda backend: op(gate, up, backend=backend),
        lambda: activation(gate) * up,
        [gate, up],
        [drawn.normal(*shape, dtype=problem.dtype)],
    )
