"""Small fixed problems on which a backend of cross_entropy is compared with exact values."""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from fasttrain_kernels import testing_losses
from fasttrain_kernels.ops.cross_entropy.reference import (
    FIELDS,
    Problem,
    Terms,
    compute_dtype,
    outcome,
    targets_of,
)

IGNORE_INDEX = -100
# Rows and classes: one column, a width that no vector divides, more than one block of a long row.
SHAPES = ((2, 1), (4, 127), (3, 5003))
DTYPES = (torch.float32, torch.bfloat16)
TERMS = (Terms(), Terms(scale=0.7, softcap=4.0, label_smoothing=0.1, z_loss=0.01))


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error of forward and backward in units of what is allowed: right is at most 1.

    Covers what `kernel` serves of these dtypes, shapes and terms: whole rows, in one pass and in
    two, and rows in two pieces.
    """
    worst = 0.0
    for dtype in DTYPES:
        for rows, classes in SHAPES:
            for terms in TERMS:
                if kernel.unsupported(Problem(device, dtype, classes)) is None:
                    found = _Problem(device, dtype, rows, classes, terms)
                    worst = max(worst, found.worst(kernel, truncating))
    return worst


class _Problem:
    """Rows of logits, a third of them ignored."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, rows: int, classes: int, terms: Terms
    ) -> None:
        generator = torch.Generator().manual_seed(rows * 7919 + classes)
        logits = 3 * torch.randn(rows, classes, generator=generator)
        labels = torch.randint(classes, (rows,), generator=generator)
        labels[1::3] = IGNORE_INDEX
        coefficients = torch.randn(rows, generator=generator)
        self.logits = logits.to(device=device, dtype=dtype)
        self.labels = labels.to(device)
        self.targets = targets_of(self.labels, IGNORE_INDEX, classes)
        self.coefficients = coefficients.to(device=device, dtype=compute_dtype(dtype))
        self.terms, self.classes = terms, classes

    def worst(self, kernel: ModuleType, truncating: bool) -> float:
        """The worst error of what `kernel` makes of it."""
        expected = testing_losses.cross_entropy_expected(
            self.logits,
            self.labels,
            self.coefficients,
            truncating=truncating,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            **self.terms._asdict(),
        )
        whole, halves = (0, self.classes), (0, self.classes // 3, self.classes)
        worst = 0.0
        for bounds in (whole, halves) if self.classes > 2 else (whole,):
            statistics, gradient = self._in_two_passes(kernel, bounds)
            worst = max(worst, self._ratio(expected, statistics, gradient))
        statistics, gradient = self._new_statistics(), self.logits.clone()
        kernel.forward_backward(
            gradient, self.targets, self.terms, statistics, True, self.coefficients
        )
        return max(worst, self._ratio(expected, statistics, gradient))

    def _in_two_passes(self, kernel: ModuleType, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The statistics and the gradient, from the columns between each two bounds."""
        statistics, gradient = self._new_statistics(), torch.empty_like(self.logits)
        pieces = [slice(*piece) for piece in pairwise(bounds)]
        for piece in pieces:
            kernel.forward(
                self.logits[:, piece], self.targets, self.terms, statistics, True, piece.start
            )
        for piece in pieces:
            kernel.backward(
                self.logits[:, piece],
                self.targets,
                self.terms,
                statistics,
                self.coefficients,
                gradient[:, piece],
                piece.start,
                self.classes,
            )
        return statistics, gradient

    def _new_statistics(self) -> Tensor:
        return self.coefficients.new_empty(self.targets.shape[0], FIELDS)

    def _ratio(
        self,
        expected: dict[str, testing_losses.Expected],
        statistics: Tensor,
        gradient: Tensor,
    ) -> float:
        rows = outcome(statistics, self.targets, self.terms, self.classes)
        return max(
            expected["loss"].ratio(rows.losses),
            expected["log_probs"].ratio(rows.log_probs),
            expected["entropy"].ratio(rows.entropy),
            expected["dlogits"].ratio(gradient),
        )
