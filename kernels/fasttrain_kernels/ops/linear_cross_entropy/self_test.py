"""Small fixed problems on which a backend of linear_cross_entropy is compared with exact values."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels import testing_losses
from fasttrain_kernels.ops.cross_entropy.reference import (
    Terms,
    compute_dtype,
    outcome,
    targets_of,
)
from fasttrain_kernels.ops.linear_cross_entropy.reference import Gradients, Head, Pair, Problem

IGNORE_INDEX = -100
DTYPES = (torch.float32, torch.bfloat16)
# Rows, width, classes, terms; with a bias and an adapter or without; with only the rows that count,
# or with all.
PROBLEMS: tuple[tuple[int, int, int, Terms, bool, bool], ...] = (
    (1, 8, 1, Terms(), False, False),
    (13, 33, 301, Terms(), False, True),
    (13, 33, 301, Terms(0.7, 4.0, 0.1, 0.01), True, False),
    (6, 40, 1009, Terms(z_loss=0.01), True, True),
)
RANK = 4


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error of forward and backward in units of what is allowed: right is at most 1.

    Covers what `kernel` serves of these dtypes and problems, by rows and by panels.
    """
    worst = 0.0
    with full_precision():
        for dtype in DTYPES:
            for rows, width, classes, terms, extras, named in PROBLEMS:
                if kernel.unsupported(Problem(device, dtype, classes)) is None:
                    found = HeadProblem(device, dtype, rows, width, classes, terms, extras, named)
                    worst = max(worst, found.worst(kernel, truncating))
    return worst


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 are of float32, whatever the process has asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class HeadProblem:
    """A head, and labels of which a third are ignored."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        rows: int,
        width: int,
        classes: int,
        terms: Terms,
        extras: bool,
        named: bool,
    ) -> None:
        generator = torch.Generator().manual_seed(rows * 7919 + classes)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator) * shape[-1] ** -0.25
            return drawn.to(device=device, dtype=dtype)

        pairs = [Pair(normal(rows, width), normal(classes, width))]
        if extras:
            pairs.append(Pair(normal(rows, RANK), normal(classes, RANK)))
        self.head = Head(tuple(pairs), normal(classes) if extras else None)
        labels = torch.randint(classes, (rows,), generator=generator)
        labels[1::3] = IGNORE_INDEX
        self.labels = labels.to(device)
        self.rows = (self.labels != IGNORE_INDEX).nonzero()[:, 0] if named else None
        coefficients = torch.randn(rows, generator=generator)
        self.coefficients = coefficients.to(device=device, dtype=compute_dtype(dtype))
        self.dtype, self.terms = dtype, terms

    def worst(self, kernel: ModuleType, truncating: bool) -> float:
        """The worst error of what `kernel` makes of it."""
        expected = self._expected(kernel, truncating)
        wanted = tuple(tensor is not None for tensor in self.head.tensors())
        targets, coefficients = self.targets(), self._counting(self.coefficients)
        common = (self.head, self.rows, targets, coefficients)
        rest = (wanted, self.dtype)
        statistics, gradients = kernel.forward(*common, self.terms, True, *rest)
        by_rows = self._ratio(expected, statistics, gradients)
        statistics = self.statistics(kernel)
        gradients = kernel.backward(*common, statistics, self.terms, *rest)
        return max(by_rows, self._ratio(expected, statistics, gradients))

    def targets(self) -> Tensor:
        """Of the rows that are computed."""
        return targets_of(self._counting(self.labels), IGNORE_INDEX, self.head.classes)

    def statistics(self, kernel: ModuleType) -> Tensor:
        """Those of a forward pass from which no gradient is wanted."""
        targets, coefficients = self.targets(), self._counting(self.coefficients)
        nothing = (False,) * len(self.head.tensors())
        statistics, gradients = kernel.forward(
            self.head, self.rows, targets, coefficients, self.terms, True, nothing, self.dtype
        )
        assert gradients == []
        return statistics

    def _counting(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]

    def _expected(self, kernel: ModuleType, truncating: bool) -> dict[str, testing_losses.Expected]:
        backend = getattr(kernel, "BACKEND", None)  # which the reference has not
        wide = compute_dtype(self.dtype)
        hidden, weight = self.head.pairs[0]
        options: dict[str, Any] = self.terms._asdict()
        return testing_losses.linear_cross_entropy_expected(
            hidden,
            weight,
            self.labels,
            self.coefficients,
            bias=self.head.bias,
            adapter=self.head.pairs[1] if len(self.head.pairs) > 1 else None,
            product_dtype=wide if backend is None else backend.product_dtype(self.dtype),
            truncating=truncating,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            **options,
        )

    def _ratio(
        self,
        expected: dict[str, testing_losses.Expected],
        statistics: Tensor,
        gradients: Gradients,
    ) -> float:
        found = outcome(statistics, self.targets(), self.terms, self.head.classes)
        named = dict(zip(("loss", "log_probs", "entropy"), found, strict=True))
        worst = 0.0
        for name, values in named.items():
            placed = torch.zeros_like(self.coefficients)
            placed[slice(None) if self.rows is None else self.rows] = values
            worst = max(worst, expected[name].ratio(placed))
        names = [*("dhidden", "dweight", "dinner", "douter")[: len(gradients) - 1], "dbias"]
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                worst = max(worst, expected[name].ratio(gradient))
        return worst
