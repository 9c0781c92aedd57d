"""The fused head on a GPU: products by cuBLAS, rows in CUDA C++."""

from functools import partial

from fasttrain_kernels.ops.cross_entropy import cuda_kernel as rows
from fasttrain_kernels.ops.cross_entropy.reference import Problem as RowProblem
from fasttrain_kernels.ops.linear_cross_entropy import by_panels, by_rows
from fasttrain_kernels.ops.linear_cross_entropy.products import gpu_backend
from fasttrain_kernels.ops.linear_cross_entropy.reference import Problem

BACKEND = gpu_backend(rows)

forward = partial(by_rows.forward, BACKEND)
backward = partial(by_panels.backward, BACKEND)


def unsupported(problem: Problem) -> str | None:
    """The reason why this backend can't serve `problem`, or None: what its rows say."""
    return rows.unsupported(RowProblem(problem.device, problem.dtype, problem.classes))
