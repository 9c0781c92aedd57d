"""Gradients to measure, and how torch does it."""

import torch
from torch.nn.utils import get_total_norm

from fasttrain_kernels.ops.grad_norm.op import Tables, grad_norm
from fasttrain_kernels.ops.grad_norm.reference import Problem
from fasttrain_kernels.workload import Drawn, Workload

SIZE = 1 << 20  # elements of a tensor: a matrix of 1024 by 1024
MOST = 1 << 24  # elements: beyond, times grow in proportion, and a model's would fill the memory


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """The norm of `rows` elements in all, 16 million at most, in tensors of a million."""
    count = min(rows or problem.rows or 1, MOST)
    whole = Drawn(problem.device).normal(count, dtype=problem.dtype)
    gradients, tables = torch.split(whole, SIZE), Tables()
    return Workload.without_gradients(
        lambda backend: grad_norm(gradients, tables=tables, backend=backend),
        lambda: get_total_norm(gradients),
    )
