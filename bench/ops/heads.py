"""Problems of a model's last layer and its loss, what they should give, and what an H200 needs."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from fasttrain_kernels.ops.cross_entropy import reference
from fasttrain_kernels.ops.linear_cross_entropy import by_rows
from fasttrain_kernels.ops.linear_cross_entropy.products import gpu_backend
from torch import Tensor

from bench.harness import H200_COPY, H200_MATMUL

IGNORE_INDEX = -100
EXACT_ROWS = 128  # whose float64 logits exist at once
EXACT_CLASSES = 256  # whose gradient is compared


@dataclass(frozen=True)
class Shape:
    """N rows of width H, V classes; a share of the rows is ignored."""

    rows: int
    width: int
    classes: int
    dtype: torch.dtype
    ignored: float = 0.0
    softcap: float | None = None

    def __str__(self) -> str:
        text = f"{self.rows}x{self.width}x{self.classes} {str(self.dtype).removeprefix('torch.')}"
        if self.softcap is not None:
            text += f" softcap {self.softcap:g}"
        return text + (f" {self.ignored:.0%} ignored" if self.ignored else "")

    @property
    def counting(self) -> int:
        return self.rows - round(self.ignored * self.rows)

    @property
    def product_flops(self) -> int:
        """Of one product of the rows that count with the whole weight."""
        return 2 * self.counting * self.width * self.classes

    @property
    def hidden_bytes(self) -> int:
        return self.rows * self.width * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.classes * self.width * self.dtype.itemsize


class Problem:
    """The tensors of a shape: logits of a standard deviation of 1, labels at random."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            drawn = torch.randn(size, generator=generator, device=device, dtype=shape.dtype)
            return drawn.requires_grad_()

        self.shape, self.device = shape, device
        self.hidden = normal(shape.rows, shape.width)
        self.weight = normal(shape.classes, shape.width)
        self.weight.data.mul_(shape.width**-0.5)
        order = torch.randperm(shape.rows, generator=generator, device=device)
        self.rows = order[: shape.counting].sort().values  # the positions that count
        self.labels = torch.full((shape.rows,), IGNORE_INDEX, device=device)
        self.labels[self.rows] = torch.randint(
            shape.classes, (shape.counting,), generator=generator, device=device
        )

    @cached_property
    def exact(self) -> "Exact":
        return Exact(self)


class Exact:
    """The loss in float64, and some rows of the weight's gradient, of these very tensors."""

    @torch.no_grad()
    def __init__(self, problem: Problem) -> None:
        shape, labels = problem.shape, problem.labels[problem.rows]
        weight = problem.weight.double()
        classes = compared_classes(labels, shape.classes)
        total = torch.zeros((), dtype=torch.float64, device=problem.device)
        gradient = torch.zeros_like(weight[classes])
        for rows, label in zip(
            problem.rows.split(EXACT_ROWS), labels.split(EXACT_ROWS), strict=True
        ):
            hidden = problem.hidden[rows].double()
            logits = capped(hidden @ weight.T, shape.softcap)
            total += F.cross_entropy(logits, label, reduction="sum")
            some = logits[:, classes]
            found = (some - logits.logsumexp(1, keepdim=True)).exp()
            found -= (label[:, None] == classes).double()
            if shape.softcap is not None:
                found *= 1 - (some / shape.softcap) ** 2
            gradient += found.T @ hidden
        self.loss = total / shape.counting
        self.classes, self.dweight = classes, gradient / shape.counting

    def errors(self, result: tuple[Tensor, ...]) -> dict[str, float]:
        """Of a provider's (loss, dhidden, dweight)."""
        loss, _, dweight = result
        return {
            "loss_error": relative(loss, self.loss),
            "dweight_error": relative(dweight[self.classes], self.dweight),
        }


def compared_classes(labels: Tensor, classes: int) -> Tensor:
    """Half of them occur as labels, where there are so many; half are spread over all."""
    step = max(1, 2 * classes // EXACT_CLASSES)
    spread = torch.arange(0, classes, step, device=labels.device)
    return torch.cat([labels[: EXACT_CLASSES // 2], spread]).unique()


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, over that of what is expected."""
    difference = found.double() - expected
    return float(difference.norm() / expected.norm())


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logits_of(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """As models write it."""
    return capped(F.linear(hidden, weight), softcap)


def h200_seconds(shape: Shape) -> float | None:
    """What the fused head by rows should take on an H200, forward and backward.

    The three products of the rows that count; for each chunk of rows after the first, dweight read
    and written in float32, which is rounded at the end; the logits read and written once; dweight
    scaled by the loss's gradient. None but for bfloat16, whose products alone were measured there.
    """
    if shape.dtype != torch.bfloat16:
        return None
    # The op's own rule, with the budget that it has on a card of so much memory.
    backend = replace(gpu_backend(reference), chunk_bytes=lambda device: 2**31)
    chunk = by_rows.chunk_rows(
        backend, shape.counting, shape.classes, shape.dtype, torch.device("cuda")
    )
    chunks = math.ceil(shape.counting / chunk)
    summing = (chunks - 1) * shape.classes * shape.width * 8
    rounding = shape.classes * shape.width * 6 if chunks > 1 else 0
    scaling = 2 * (shape.weight_bytes + shape.hidden_bytes)
    logits = shape.counting * shape.classes * 2 * shape.dtype.itemsize
    return (
        3 * shape.product_flops / H200_MATMUL + (summing + rounding + scaling + logits) / H200_COPY
    )
