"""Tensors to step, and how training loops do it without a kernel."""

from fasttrain_kernels.ops.optimizer_step import reference
from fasttrain_kernels.ops.optimizer_step.op import optimizer_step
from fasttrain_kernels.ops.optimizer_step.reference import Problem
from fasttrain_kernels.testing_optimizer import random_step
from fasttrain_kernels.workload import Workload

SIZE = 1 << 20  # elements of a tensor: a matrix of 1024 by 1024
MOST = 1 << 24  # elements: beyond, times grow in proportion, and a model's would fill the memory


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """A step of `rows` elements in all, 16 million at most, in tensors of a million."""
    count = min(rows or problem.rows or 1, MOST)
    sizes = [SIZE] * (count // SIZE) + ([count % SIZE] if count % SIZE else [])
    work = random_step(problem, sizes)
    return Workload.without_gradients(
        lambda backend: optimizer_step(work, backend=backend), lambda: reference.step(work)
    )
