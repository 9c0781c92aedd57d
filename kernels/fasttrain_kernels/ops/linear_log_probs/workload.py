"""A head and the log-probabilities of labels, and how models without a kernel make them."""

import torch
import torch.nn.functional as F

from fasttrain_kernels.ops.cross_entropy.reference import compute_dtype
from fasttrain_kernels.ops.linear_cross_entropy.reference import Problem
from fasttrain_kernels.ops.linear_cross_entropy.workload import head_tensors
from fasttrain_kernels.ops.linear_log_probs.op import linear_log_probs
from fasttrain_kernels.workload import Workload


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of `rows` positions, all of which count."""
    hidden, weight, labels, every = head_tensors(problem, rows)
    wide = compute_dtype(problem.dtype)
    return Workload(
        lambda backend: linear_log_probs(hidden, weight, labels, rows=every, backend=backend),
        lambda: -F.cross_entropy(F.linear(hidden, weight).to(wide), labels, reduction="none"),
        [hidden, weight],
        [torch.ones(labels.shape, device=labels.device, dtype=wide)],
    )
