"""The fused head by rows: 3 products, 6 S V H FLOPs, all in the forward pass.

Whole rows of logits, as many as a byte budget allows, become their own gradient in place and go
into dhidden and dweight at once. Each chunk after the first reads and writes all of dweight, 8 V H
bytes beside the 6 n V H FLOPs of its n rows. So n is bounded from below, whatever V and H are: a
machine of r FLOPs a byte loses 1.3 r / n, which is 5 % of an H200 at n = 4900, of a CPU at 260.
"""

import torch
from torch import Tensor

from fasttrain_kernels.ops.cross_entropy.reference import Terms, compute_dtype
from fasttrain_kernels.ops.linear_cross_entropy import by_panels
from fasttrain_kernels.ops.linear_cross_entropy.products import (
    Backend,
    ClassGradient,
    RowGradient,
    make_logits,
    taken,
)
from fasttrain_kernels.ops.linear_cross_entropy.reference import (
    Gradients,
    Head,
    Wanted,
    new_statistics,
)

ALIGNED_ROWS = 16  # of a chunk, so that the tiles of every product are whole


def forward(
    backend: Backend,
    head: Head,
    rows: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    terms: Terms,
    wants_entropy: bool,
    wanted: Wanted,
    dtype: torch.dtype,
) -> tuple[Tensor, Gradients]:
    """As reference.forward."""
    if not any(wanted):
        found = by_panels.forward(backend, head, rows, targets, terms, wants_entropy, dtype)
        return found, []
    dtype = backend.product_dtype(dtype)
    statistics = new_statistics(head, targets)
    count = targets.shape[0]
    step = chunk_rows(backend, count, head.classes, dtype, targets.device)
    sums = _Sums(head, rows, wanted, dtype, single=count <= step)
    _add_chunks(
        backend, head, rows, targets, coefficients, terms, wants_entropy, statistics, sums, step
    )
    return statistics, sums.gradients()


def _add_chunks(
    backend: Backend,
    head: Head,
    rows: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    terms: Terms,
    wants_entropy: bool,
    statistics: Tensor,
    sums: "_Sums",
    step: int,
) -> None:
    """Statistics and gradients, `step` rows at a time. The logits' memory is let go at the end:
    rounding the sums takes memory of its own."""
    dtype, count = sums.dtype, targets.shape[0]
    rights = [pair.right.to(dtype) for pair in head.pairs]
    bias = None if head.bias is None else head.bias.to(dtype)
    memory = rights[0].new_empty(step, head.classes)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        lefts = [taken(pair.left, rows, part, dtype) for pair in head.pairs]
        logits = make_logits(lefts, rights, bias, memory[: part.stop - start])
        backend.kernel.forward_backward(
            logits, targets[part], terms, statistics[part], wants_entropy, coefficients[part]
        )
        sums.add(part, logits, lefts, rights)


def chunk_rows(
    backend: Backend, count: int, classes: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Rows of a chunk: within the budget, and all chunks about alike."""
    fitting = backend.chunk_bytes(device) // (classes * dtype.itemsize)
    most = max(1, min(backend.efficient_rows, fitting, count))
    even = -(-count // -(-count // most)) if count else 1
    return min(most, -(-even // ALIGNED_ROWS) * ALIGNED_ROWS)


class _Sums:
    """The gradients that are wanted, while the chunks come in."""

    def __init__(
        self, head: Head, rows: Tensor | None, wanted: Wanted, dtype: torch.dtype, single: bool
    ) -> None:
        self.dtype = dtype
        wants_left, wants_right, wants_bias = wanted[0:-1:2], wanted[1:-1:2], wanted[-1]
        self.lefts = [
            RowGradient(pair.left, rows) if wants else None
            for pair, wants in zip(head.pairs, wants_left, strict=True)
        ]
        self.rights = [
            ClassGradient(pair.right, dtype, single) if wants else None
            for pair, wants in zip(head.pairs, wants_right, strict=True)
        ]
        self.bias = head.bias
        self.dbias = None
        if wants_bias and head.bias is not None:
            self.dbias = torch.zeros_like(head.bias, dtype=compute_dtype(dtype))

    def add(self, part: slice, dlogits: Tensor, lefts: list[Tensor], rights: list[Tensor]) -> None:
        for dleft, dright, left, right in zip(self.lefts, self.rights, lefts, rights, strict=True):
            if dleft is not None:
                dleft.put(part, dlogits, right)
            if dright is not None:
                dright.add(dlogits, left)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)

    def gradients(self) -> Gradients:
        found: Gradients = []
        for dleft, dright in zip(self.lefts, self.rights, strict=True):
            found.append(None if dleft is None else dleft.gradient)
            found.append(None if dright is None else dright.result())
        dbias = self.dbias
        found.append(None if dbias is None or self.bias is None else dbias.to(self.bias.dtype))
        return found
