"""The fused head by panels of classes: 4 products, 8 S V H FLOPs, one of them in the forward pass.

The forward pass leaves five numbers a row. The backward pass makes the logits again, of all rows
and a panel of classes at a time: dweight is written once, panel by panel, and dhidden is added up.
What a row's loss will be multiplied by need not be known before, and nothing as large as the
logits or the weight is ever held beside the gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fasttrain_kernels.ops.cross_entropy.reference import Terms, compute_dtype
from fasttrain_kernels.ops.linear_cross_entropy.products import (
    Backend,
    make_logits,
    product,
    taken,
)
from fasttrain_kernels.ops.linear_cross_entropy.reference import (
    Gradients,
    Head,
    Wanted,
    new_statistics,
)

NARROWEST_PANEL = 256  # classes: products of fewer don't fill a machine
ALIGNED_CLASSES = 64  # of a panel, so that the tiles of every product are whole
ALL = slice(None)


def forward(
    backend: Backend,
    head: Head,
    rows: Tensor | None,
    targets: Tensor,
    terms: Terms,
    wants_entropy: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The statistics (S, 5), as reference.forward where no gradient is wanted."""
    dtype = backend.product_dtype(dtype)
    statistics = new_statistics(head, targets)
    lefts = [taken(pair.left, rows, ALL, dtype) for pair in head.pairs]
    for panel, _, logits in _panels(backend, head, lefts):
        backend.kernel.forward(logits, targets, terms, statistics, wants_entropy, panel.start)
    return statistics


def backward(
    backend: Backend,
    head: Head,
    rows: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    statistics: Tensor,
    terms: Terms,
    wanted: Wanted,
    dtype: torch.dtype,
) -> Gradients:
    """As reference.backward."""
    dtype = backend.product_dtype(dtype)
    lefts = [taken(pair.left, rows, ALL, dtype) for pair in head.pairs]
    dlefts = [
        left.new_zeros(left.shape, dtype=compute_dtype(dtype)) if wants else None
        for left, wants in zip(lefts, wanted[0:-1:2], strict=True)
    ]
    drights = [
        torch.empty_like(pair.right, memory_format=torch.contiguous_format) if wants else None
        for pair, wants in zip(head.pairs, wanted[1:-1:2], strict=True)
    ]
    dbias = torch.empty_like(head.bias) if wanted[-1] and head.bias is not None else None
    for panel, rights, logits in _panels(backend, head, lefts):
        backend.kernel.backward(
            logits, targets, terms, statistics, coefficients, logits, panel.start, head.classes
        )
        for dleft, dright, left, right in zip(dlefts, drights, lefts, rights, strict=True):
            if dleft is not None:
                product(logits, right, dleft, add=True)
            if dright is not None:
                product(logits.T, left, dright[panel])
        if dbias is not None:
            dbias[panel] = logits.sum(0, dtype=compute_dtype(dtype))
    found: Gradients = []
    for pair, dleft, dright in zip(head.pairs, dlefts, drights, strict=True):
        found += [None if dleft is None else _placed(dleft, pair.left, rows), dright]
    return [*found, dbias]


def panel_width(
    backend: Backend, count: int, classes: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Classes of a panel: within the budget, and not too few."""
    fitting = backend.panel_bytes(device) // (max(1, count) * dtype.itemsize)
    return min(classes, max(NARROWEST_PANEL, fitting // ALIGNED_CLASSES * ALIGNED_CLASSES))


def _panels(
    backend: Backend, head: Head, lefts: list[Tensor]
) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
    """Each panel: its classes, the right factors' part of them, and its logits (S, v).

    The logits of all panels lie in the same memory."""
    count, classes = lefts[0].shape[0], head.classes
    dtype = lefts[0].dtype
    width = panel_width(backend, count, classes, dtype, lefts[0].device)
    memory = lefts[0].new_empty(count * width)
    for start in range(0, classes, width):
        panel = slice(start, min(start + width, classes))
        rights = [pair.right[panel].to(dtype) for pair in head.pairs]
        bias = None if head.bias is None else head.bias[panel].to(dtype)
        columns = panel.stop - start
        logits = memory[: count * columns].view(count, columns)
        yield panel, rights, make_logits(lefts, rights, bias, logits)


def _placed(gradient: Tensor, left: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of a gradient at their places among zeros, in the factor's dtype."""
    gradient = gradient.to(left.dtype)
    if rows is None:
        return gradient
    zeros = torch.zeros(left.shape, dtype=left.dtype, device=left.device)
    return zeros.index_copy_(0, rows, gradient)
