"""Queries and keys to rotate, and how models without a kernel do it."""

import torch
from torch import Tensor

from fasttrain_kernels.ops.rope.op import rope
from fasttrain_kernels.ops.rope.reference import Problem
from fasttrain_kernels.ops.rope.table import frequencies, rope_table
from fasttrain_kernels.workload import Drawn, Workload


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of `rows` tokens, whole heads, without their norm."""
    tokens, width, dtype = rows or problem.rows, problem.head_dim, problem.dtype
    heads = (problem.query_heads or 1, problem.key_heads or 1)
    drawn = Drawn(problem.device)
    q, k = (drawn.leaf(tokens, count, width, dtype=dtype) for count in heads)
    gradients = [drawn.normal(tokens, count, width, dtype=dtype) for count in heads]
    even = width // 2 * 2
    positions = torch.arange(tokens, device=problem.device)
    table = rope_table(positions, frequencies(1e4, even, problem.device))
    halves = problem.style == "half"
    doubled = (part.repeat(1, 2) if halves else part.repeat_interleave(2, 1) for part in table)
    cos, sin = (part[:, None].to(dtype) for part in doubled)

    def plain() -> tuple[Tensor, ...]:
        """apply_rotary_pos_emb of transformers."""
        return tuple(_turned(x, cos, sin, even, halves) for x in (q, k))

    return Workload(
        lambda backend: rope(q, k, table=table, style=problem.style, backend=backend),
        plain,
        [q, k],
        gradients,
    )


def _turned(x: Tensor, cos: Tensor, sin: Tensor, even: int, halves: bool) -> Tensor:
    turning, rest = x[..., :even], x[..., even:]
    if halves:
        first, second = turning.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    else:
        other = torch.stack((-turning[..., 1::2], turning[..., 0::2]), -1).flatten(-2)
    turned = turning * cos + other * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)
