"""As many numbers as the problem has rows."""

import torch
from fasttrain_kernels.workload import Drawn, Workload
from toy_op.op import double


def workload(problem, *, rows=0, lengths=()):
    drawn, count = Drawn(problem.device), rows or problem.rows
    x = drawn.leaf(count, dtype=torch.float32)
    gradient = drawn.normal(count, dtype=torch.float32)
    return Workload(lambda backend: double(x, backend), lambda: 2 * x, [x], [gradient])
