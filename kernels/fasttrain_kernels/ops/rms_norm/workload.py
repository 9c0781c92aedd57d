"""Rows to normalise, and how models without a kernel do it."""

import torch
from torch import Tensor

from fasttrain_kernels.ops.rms_norm import reference
from fasttrain_kernels.ops.rms_norm.op import rms_norm
from fasttrain_kernels.ops.rms_norm.reference import Problem
from fasttrain_kernels.workload import Drawn, Workload

EPS = 1e-6


def workload(problem: Problem, *, rows: int = 0, lengths: tuple[int, ...] = ()) -> Workload:
    """Forward and backward of `rows` rows."""
    drawn, style = Drawn(problem.device), problem.style
    shape = (rows or problem.rows, problem.width)
    x = drawn.leaf(*shape, dtype=problem.dtype)
    weight = drawn.leaf(problem.width, dtype=problem.weight_dtype)
    residual_dtype = problem.residual_dtype
    residual = None if residual_dtype is None else drawn.leaf(*shape, dtype=residual_dtype)
    y_dtype = reference.output_dtype(problem.dtype, residual_dtype, problem.weight_dtype, style)
    gradients = [drawn.normal(*shape, dtype=y_dtype)]
    if residual_dtype is not None:
        sum_dtype = reference.sum_dtype(problem.dtype, residual_dtype)
        gradients.append(drawn.normal(*shape, dtype=sum_dtype))

    def call(backend: str) -> Tensor | tuple[Tensor, ...]:
        if residual is None:
            return rms_norm(x, weight, EPS, style=style, backend=backend)
        return rms_norm(x, weight, EPS, residual=residual, style=style, backend=backend)

    def plain() -> Tensor | tuple[Tensor, ...]:
        total = x if residual is None else x + residual
        y = _as_models_do(total, weight, style)
        return y if residual is None else (y, total)

    leaves = [tensor for tensor in (x, weight, residual) if tensor is not None]
    return Workload(call, plain, leaves, gradients)


def _as_models_do(x: Tensor, weight: Tensor, style: str) -> Tensor:
    """LlamaRMSNorm, GemmaRMSNorm and Olmo2RMSNorm of transformers."""
    wide = x.to(reference.compute_dtype(x.dtype))
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if style == "llama":
        return weight * normalized.to(x.dtype)
    if style == "gemma":
        return (normalized * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return (weight * normalized).to(x.dtype)
