"""Small fixed problems on which a backend of swiglu or geglu is compared with exact values."""

from types import ModuleType

import torch

from fasttrain_kernels.ops.swiglu.reference import Problem
from fasttrain_kernels.testing_glu import glu_expected

# Rows and widths: a single element, an odd width, more than one block of a row.
SHAPES = ((1, 1), (3, 63), (2, 1051))
DTYPES = (torch.float32, torch.bfloat16)
WIDEST = 12.0  # gates are spread to both sides as far as this, where activations are flat


def parity(
    kernel: ModuleType,
    device: torch.device,
    truncating: bool = False,
    activations: tuple[str, ...] = ("silu",),
) -> float:
    """The worst error of forward and backward in units of what is allowed: right is at most 1.

    Covers what `kernel` serves of these dtypes, shapes and activations: tensors that are whole,
    and halves of packed ones.
    """
    worst = 0.0
    for dtype in DTYPES:
        for shape in SHAPES:
            for activation in activations:
                if kernel.unsupported(Problem(device, dtype, activation)) is not None:
                    continue
                for packed in (False, True):
                    found = _one(kernel, device, dtype, shape, activation, packed, truncating)
                    worst = max(worst, found)
    return worst


def _one(
    kernel: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    activation: str,
    packed: bool,
    truncating: bool,
) -> float:
    rows, width = shape
    generator = torch.Generator().manual_seed(rows * 7919 + width)

    def normal(columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(device=device, dtype=dtype)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        first, second = normal(2 * width).chunk(2, dim=1)
        return (first, second) if packed else (first.contiguous(), second.contiguous())

    (gate, up), (dgate, dup) = pair(), pair()
    gate *= WIDEST / 3
    dy, y = normal(width), normal(width)
    kernel.forward(gate, up, activation, y)
    kernel.backward(dy, gate, up, activation, dgate, dup)
    expected = glu_expected(gate, up, activation, dy, truncating=truncating)
    found = {"y": y, "dgate": dgate, "dup": dup}
    return max(expected[name].ratio(found[name]) for name in found)
