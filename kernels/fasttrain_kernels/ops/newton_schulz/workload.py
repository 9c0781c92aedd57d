"""Matrices to orthogonalise, and how optimizers do it without a kernel."""

import torch
from torch import Tensor

from fasttrain_kernels.ops.newton_schulz.op import newton_schulz
from fasttrain_kernels.ops.newton_schulz.reference import EPS, QUINTIC, Problem
from fasttrain_kernels.workload import Drawn, Workload

STEPS = 5


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """`rows` matrices of the problem's sizes."""
    count = rows or problem.rows or 1
    shape = (count, problem.short or 1, problem.long or 1)
    matrices = Drawn(problem.device).normal(*shape, dtype=problem.dtype)
    return Workload.without_gradients(
        lambda backend: newton_schulz(matrices, method=problem.method, backend=backend),
        lambda: torch.stack([one_by_one(matrix) for matrix in matrices]),
        [matrices],
    )


def one_by_one(matrix: Tensor) -> Tensor:
    """What loops over parameters compute: one matrix with no more rows than columns, its dtype."""
    a, b, c = QUINTIC
    x = matrix / matrix.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
