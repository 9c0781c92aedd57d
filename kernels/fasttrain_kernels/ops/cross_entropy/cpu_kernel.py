"""Cross-entropy of rows of logits in C++ (csrc/cpu/cross_entropy*.cpp), on torch's threads.

A row is one thread's work, so the result is the same bits on any number of threads.
"""

import torch
from torch import Tensor

from fasttrain_kernels import native
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.cross_entropy.reference import Problem, Terms

SERVED = (torch.float32, torch.float64, torch.bfloat16)


def unsupported(problem: Problem) -> str | None:
    """The reason why the C++ kernel can't serve `problem`, or None."""
    if problem.device.type != "cpu":
        return f"runs on CPUs; the tensors are on {problem.device.type}"
    if problem.dtype not in SERVED:
        listed = ", ".join(short(dtype) for dtype in SERVED)
        return f"serves {listed}, not {short(problem.dtype)}"
    return native.why_not("_C_cpu")


def forward(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    statistics: Tensor,
    wants_entropy: bool,
    first: int = 0,
) -> None:
    """As reference.forward."""
    torch.ops.fasttrain_native.cross_entropy_forward(
        logits,
        targets.contiguous(),
        terms.scale,
        terms.softcap or 0.0,
        terms.label_smoothing != 0,
        wants_entropy,
        first,
        statistics,
    )


def backward(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    statistics: Tensor,
    coefficients: Tensor,
    out: Tensor,
    first: int,
    classes: int,
) -> None:
    """As reference.backward; `out` has the logits' dtype."""
    assert out.dtype == logits.dtype
    torch.ops.fasttrain_native.cross_entropy_backward(
        logits,
        targets.contiguous(),
        statistics,
        coefficients.contiguous(),
        terms.scale,
        terms.softcap or 0.0,
        terms.label_smoothing,
        terms.z_loss,
        first,
        classes,
        out,
    )


def forward_backward(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    statistics: Tensor,
    wants_entropy: bool,
    coefficients: Tensor,
) -> None:
    """As reference.forward_backward."""
    torch.ops.fasttrain_native.cross_entropy_forward_backward(
        logits,
        targets.contiguous(),
        coefficients.contiguous(),
        terms.scale,
        terms.softcap or 0.0,
        terms.label_smoothing,
        terms.z_loss,
        wants_entropy,
        statistics,
    )
