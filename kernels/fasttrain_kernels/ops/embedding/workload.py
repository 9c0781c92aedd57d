"""Tokens to look up, and how models without a kernel do it."""

import torch.nn.functional as F

from fasttrain_kernels.ops.embedding.op import embedding
from fasttrain_kernels.ops.embedding.reference import Problem
from fasttrain_kernels.workload import Drawn, Workload


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of `rows` ids, as frequent as words are."""
    count, vocabulary = rows or problem.rows, problem.vocabulary or 1
    drawn = Drawn(problem.device)
    ids = drawn.words(count, vocabulary)
    weight = drawn.leaf(vocabulary, problem.width, dtype=problem.dtype)
    return Workload(
        lambda backend: embedding(ids, weight, backend=backend),
        lambda: F.embedding(ids, weight),
        [weight],
        [drawn.normal(count, problem.width, dtype=problem.dtype)],
    )
