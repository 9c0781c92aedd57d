"""A head and its loss, and how models without a kernel make it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain_kernels.ops.cross_entropy.reference import compute_dtype
from fasttrain_kernels.ops.linear_cross_entropy.op import linear_cross_entropy
from fasttrain_kernels.ops.linear_cross_entropy.reference import Problem
from fasttrain_kernels.workload import Drawn, Workload


class HeadTensors(NamedTuple):
    """A head, and positions that all count."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,)
    rows: Tensor  # (N,): each of them


def head_tensors(problem: Problem, rows: int) -> HeadTensors:
    """Of `rows` positions; 0 for as many as the problem says."""
    count, width, device = rows or problem.rows, problem.width or 1, problem.device
    drawn = Drawn(device)
    return HeadTensors(
        drawn.leaf(count, width, dtype=problem.dtype),
        drawn.leaf(problem.classes, width, dtype=problem.dtype, scale=width**-0.5),
        drawn.labels(count, problem.classes),
        torch.arange(count, device=device),
    )


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of the sum over `rows` positions, all of which count."""
    hidden, weight, labels, every = head_tensors(problem, rows)
    wide = compute_dtype(problem.dtype)

    def call(backend: str) -> Tensor:
        loss = linear_cross_entropy(
            hidden, weight, labels, rows=every, reduction="sum", backend=backend
        )
        assert isinstance(loss, Tensor)
        return loss

    return Workload(
        call,
        lambda: F.cross_entropy(F.linear(hidden, weight).to(wide), labels, reduction="sum"),
        [hidden, weight],
        [torch.ones((), device=problem.device, dtype=wide)],
    )
