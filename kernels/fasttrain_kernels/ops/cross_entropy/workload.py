"""Logits and labels, and the loss that models without a kernel make of them."""

import torch
import torch.nn.functional as F

from fasttrain_kernels.ops.cross_entropy.op import cross_entropy
from fasttrain_kernels.ops.cross_entropy.reference import Problem, compute_dtype
from fasttrain_kernels.workload import Drawn, Workload


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of the mean over `rows` rows."""
    count, classes, device = rows or problem.rows, problem.classes, problem.device
    drawn, wide = Drawn(device), compute_dtype(problem.dtype)
    logits = drawn.leaf(count, classes, dtype=problem.dtype)
    labels = drawn.labels(count, classes)

    def call(backend: str) -> torch.Tensor:
        loss = cross_entropy(logits, labels, backend=backend)
        assert isinstance(loss, torch.Tensor)
        return loss

    return Workload(
        call,
        lambda: F.cross_entropy(logits.to(wide), labels),
        [logits],
        [torch.ones((), device=device, dtype=wide)],
    )
