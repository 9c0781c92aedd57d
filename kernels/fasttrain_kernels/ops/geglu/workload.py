"""Gates to apply, and how models without a kernel do it."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from fasttrain_kernels.ops.geglu.op import geglu
from fasttrain_kernels.ops.swiglu.reference import Problem
from fasttrain_kernels.ops.swiglu.workload import gated
from fasttrain_kernels.workload import Workload


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of `rows` rows, in two tensors."""
    approximate = "tanh" if problem.activation == "gelu_tanh" else "none"

    def activation(gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate=approximate)

    return gated(problem, rows, partial(geglu, approximate=approximate), activation)
