"""A head and its loss, and how models without a kernel make it."""

import torch
import torch.nn.functional as F

from fasttrain_kernels.ops.cross_entropy.reference import compute_dtype
from fasttrain_kernels.ops.linear_cross_entropy.op import linear_cross_entropy
from fasttrain_kernels.ops.linear_cross_entropy.reference import Problem
from fasttrain_kernels.workload import Drawn, Workload


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of the sum over `rows` positions, all of which count."""
    count, classes, device = rows or problem.rows, problem.classes, problem.device
    width, wide = problem.width or 1, compute_dtype(problem.dtype)
    drawn, every = Drawn(device), torch.arange(count, device=device)
    hidden = drawn.leaf(count, width, dtype=problem.dtype)
    weight = drawn.leaf(classes, width, dtype=problem.dtype, scale=width**-0.5)
    labels = drawn.labels(count, classes)

    def call(backend: str) -> torch.Tensor:
        loss = linear_cross_entropy(
            hidden, weight, labels, rows=every, reduction="sum", backend=backend
        )
        assert isinstance(loss, torch.Tensor)
        return loss

    return Workload(
        call,
        lambda: F.cross_entropy(F.linear(hidden, weight).to(wide), labels, reduction="sum"),
        [hidden, weight],
        [torch.ones((), device=device, dtype=wide)],
    )
