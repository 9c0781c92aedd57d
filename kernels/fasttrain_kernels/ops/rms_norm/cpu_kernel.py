"""RMS normalisation in C++ (csrc/cpu/rms_norm*.cpp): one pass over each row, on torch's threads.

Bitwise repeatable, whatever the number of threads: dw is added up in a fixed order.
"""

import torch
from torch import Tensor

from fasttrain_kernels import native
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.rms_norm import reference
from fasttrain_kernels.ops.rms_norm.reference import Problem

SERVED = (torch.float32, torch.float64, torch.bfloat16)

# dw is summed over this many rows at a time, then over these sums: at least ROWS_PER_CHUNK rows,
# so that writing the sums is at most 3 % of the traffic, and at most MAX_CHUNKS of them.
ROWS_PER_CHUNK = 32
MAX_CHUNKS = 256


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    if problem.device.type != "cpu":
        return f"runs on CPUs; the tensors are on {problem.device.type}"
    dtypes = {problem.dtype, problem.weight_dtype, problem.residual_dtype or problem.dtype}
    unserved = dtypes - set(SERVED)
    if unserved:
        listed = ", ".join(short(dtype) for dtype in SERVED)
        return f"serves {listed}, not {short(unserved.pop())}"
    if torch.float64 in dtypes and len(dtypes) > 1:
        return "float64 can't be mixed with another dtype"
    return native.why_not("_C_cpu")


def forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, style: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.forward."""
    residual_dtype = None if residual is None else residual.dtype
    total_dtype = reference.sum_dtype(x.dtype, residual_dtype)
    wide = reference.compute_dtype(total_dtype)
    y_dtype = reference.output_dtype(x.dtype, residual_dtype, weight.dtype, style)
    y = x.new_empty(x.shape, dtype=y_dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=total_dtype)
    rstd = x.new_empty(x.shape[0], dtype=wide)
    torch.ops.fasttrain_native.rms_norm_forward(
        x, _scale(weight, style, wide), residual, eps, style == "llama", y, total, rstd
    )
    return y, total, rstd


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    style: str,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """As reference.backward."""
    rows, width = x.shape
    chunks = min(MAX_CHUNKS, -(-rows // ROWS_PER_CHUNK))
    dx = x.new_empty(x.shape if needs_dx else 0)
    dweight = rstd.new_empty(width if needs_dweight else 0)
    partials = rstd.new_empty(chunks, width if needs_dweight else 0)
    torch.ops.fasttrain_native.rms_norm_backward(
        dy.contiguous(),
        None if dsum is None else dsum.contiguous(),
        x,
        _scale(weight, style, rstd.dtype),
        rstd,
        dx,
        dweight,
        partials,
    )
    return dx, dweight.to(weight.dtype)


def _scale(weight: Tensor, style: str, dtype: torch.dtype) -> Tensor:
    return reference.scale(weight, style, dtype).contiguous()
