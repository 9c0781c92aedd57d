"""Cross-entropy of rows of logits by the native libraries: one schema, which both implement.

`torch.ops.fasttrain_native` runs the C++ of the CPU library or the CUDA library's kernels, by the
device of the tensors.
"""

import torch
from torch import Tensor

from fasttrain_kernels.ops.cross_entropy.reference import Terms


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
