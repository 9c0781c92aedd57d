"""The norm of all gradients, in one pass and without a wait."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fasttrain_kernels.checks import floating
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.grad_norm.reference import Problem
from fasttrain_kernels.ops.optimizer_step.table import Table
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.grad_norm"
NAME = "grad_norm"
MIXED = {torch.float32, torch.bfloat16}


def describe(*, device: torch.device | str, dtype: torch.dtype, rows: int = 0) -> Problem:
    """The problem of gradients of `rows` elements in all."""
    return Problem(torch.device(device), dtype, rounded(rows))


GRAD_NORM = Op(
    NAME,
    candidates=(
        Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
        Candidate("cuda", f"{FOLDER}.cuda_kernel", devices=("cuda",), isolated=True),
    ),
    folder=FOLDER,
    describe=describe,
    example={},
)


class Tables:
    """Where a caller that asks for the norm of the same gradients again keeps their tables."""

    def __init__(self) -> None:
        self._of: dict[torch.device, Table] = {}

    def on(self, device: torch.device) -> Table:
        """The table for gradients of a device."""
        return self._of.setdefault(device, Table())


@torch.no_grad()
def grad_norm(
    gradients: Iterable[Tensor], *, tables: Tables | None = None, backend: str = AUTO
) -> Tensor:
    """sqrt of the sum of squares of all elements: () float32, on the first gradient's device.

    Any shapes, floating dtypes and devices; an empty list has the norm 0, on the CPU. The same bits
    every time: sums are formed in a fixed order, on CPUs whatever the number of threads. float32
    sums of 1024 squares and float64 sums of those, so that no norm below 1e19 overflows. Nothing
    waits for the device. What torch.nn.utils.get_total_norm is, in one pass.

    tables: kept by who asks again and again, so that a GPU is told only what has changed.

    Raises ValueError for what isn't floating, UnsupportedKernel where the backend asked for can't
    serve.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for number, gradient in enumerate(gradients):
        floating(NAME, **{f"gradients[{number}]": gradient})
        by_device.setdefault(gradient.device, []).append(gradient.detach())
    tables = tables or Tables()
    norms = [_norm(group, tables.on(device), backend) for device, group in by_device.items()]
    if len(norms) == 1:
        return norms[0]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _norm(gradients: Sequence[Tensor], table: Table, backend: str) -> Tensor:
    dense = [gradient.contiguous() for gradient in gradients]
    dtypes = {gradient.dtype for gradient in dense}
    others = sorted(dtypes - MIXED, key=str)
    dtype = others[0] if others else torch.float32 if len(dtypes) > 1 else dtypes.pop()
    problem = Problem(dense[0].device, dtype, rounded(sum(t.numel() for t in dense)))
    result: Tensor = GRAD_NORM.run(
        "forward", problem, backend, lambda kernel: kernel.norm(dense, table)
    )
    return result
