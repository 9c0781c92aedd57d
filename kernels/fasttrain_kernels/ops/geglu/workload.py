"""Gates to apply, and how models without a kernel do it."""

from functools import partial

import torch.nn.functional as F

from fasttrain_kernels.ops.geglu.op import geglu
from fasttrain_kernels.ops.swiglu.reference import Problem
from fasttrain_kernels.ops.swiglu.workload import gated
from fasttrain_kernels.workload import Workload


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of `rows` rows, in two tensors, by tanh."""
    return gated(problem, rows, geglu, partial(F.gelu, approximate="tanh"))
