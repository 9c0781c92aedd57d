"""Cross-entropy of logits that a linear layer makes, from its definition, in plain PyTorch.

    logits = sum over pairs of left @ right.T, + bias
    statistics, loss and dlogits of each row: as ../cross_entropy/reference.py has them
    dleft = dlogits @ right      dright = dlogits.T @ left      dbias = sum of the rows of dlogits

The first pair is the hidden states (N, H) and the layer's weight (V, H). A low-rank adapter of the
layer is a second one, (N, R) and (V, R), so that it needs no (V, H) of its own (LoRA,
arXiv 2106.09685). S of the N rows count.

All products are of float32 (float64 for float64), and the logits of all S rows exist at once: what
the other backends avoid.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.ops.cross_entropy import reference as row_reference
from fasttrain_kernels.ops.cross_entropy.reference import FIELDS, Problem, Terms, compute_dtype


class Pair(NamedTuple):
    """Two factors of the logits."""

    left: Tensor  # (N, K)
    right: Tensor  # (V, K)


class Head(NamedTuple):
    """The layer and what enters it."""

    pairs: tuple[Pair, ...]
    bias: Tensor | None  # (V,)

    @property
    def classes(self) -> int:
        return self.pairs[0].right.shape[0]

    def tensors(self) -> list[Tensor | None]:
        """left, right, left, right, ..., bias: the order of gradients and of what is wanted."""
        return [*(tensor for pair in self.pairs for tensor in pair), self.bias]


# Of each of Head.tensors(): whether its gradient is wanted; and the gradient, None where it is not.
Wanted = tuple[bool, ...]
Gradients = list[Tensor | None]


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


def forward(
    head: Head,
    rows: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    terms: Terms,
    wants_entropy: bool,
    wanted: Wanted,
    dtype: torch.dtype,
) -> tuple[Tensor, Gradients]:
    """The statistics (S, 5), and those gradients of sum(coefficients * loss) that are wanted.

    rows (S,) int64: which positions count; None: all. targets, coefficients (S,). dtype: of the
    products' operands, where the backend multiplies in narrow ones.
    """
    statistics = new_statistics(head, targets)
    logits = _logits(head, rows)
    row_reference.forward(logits, targets, terms, statistics, wants_entropy)
    if not any(wanted):
        return statistics, []
    _to_gradient(logits, targets, coefficients, statistics, terms)
    return statistics, _gradients(head, rows, logits, wanted)


def backward(
    head: Head,
    rows: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    statistics: Tensor,
    terms: Terms,
    wanted: Wanted,
    dtype: torch.dtype,
) -> Gradients:
    """The gradients, from the statistics that forward has left."""
    logits = _logits(head, rows)
    _to_gradient(logits, targets, coefficients, statistics, terms)
    return _gradients(head, rows, logits, wanted)


def new_statistics(head: Head, targets: Tensor) -> Tensor:
    """(S, 5), not filled in."""
    dtype = compute_dtype(head.pairs[0].left.dtype)
    return torch.empty(targets.shape[0], FIELDS, dtype=dtype, device=targets.device)


def _logits(head: Head, rows: Tensor | None) -> Tensor:
    products = [_rows(pair.left, rows) @ _wide(pair.right).T for pair in head.pairs]
    logits = products[0] if len(products) == 1 else torch.stack(products).sum(0)
    return logits if head.bias is None else logits + _wide(head.bias)


def _to_gradient(
    logits: Tensor, targets: Tensor, coefficients: Tensor, statistics: Tensor, terms: Terms
) -> None:
    row_reference.backward(
        logits, targets, terms, statistics, coefficients, logits, 0, logits.shape[1]
    )


def _gradients(head: Head, rows: Tensor | None, dlogits: Tensor, wanted: Wanted) -> Gradients:
    found: Gradients = []
    for pair in head.pairs:
        dleft = dlogits @ _wide(pair.right)
        if rows is not None:  # at their places among zeros
            zeros = torch.zeros(pair.left.shape, dtype=dleft.dtype, device=dleft.device)
            dleft = zeros.index_copy_(0, rows, dleft)
        found += [
            dleft.to(pair.left.dtype),
            (dlogits.T @ _rows(pair.left, rows)).to(pair.right.dtype),
        ]
    found.append(None if head.bias is None else dlogits.sum(0).to(head.bias.dtype))
    return [grad if wants else None for grad, wants in zip(found, wanted, strict=True)]


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return _wide(tensor if rows is None else tensor.index_select(0, rows))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))
