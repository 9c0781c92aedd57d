"""The tensors of a step as kernels read them: a row of numbers and addresses each.

It lies on the device, and is written anew only when something in it has changed: an optimizer that
steps the same tensors makes one launch, and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fasttrain_kernels.ops.optimizer_step.step import Slot

# Elements, as kBlock and kChunk of csrc/common/optimizer.h: those whose moments of 8 bits share a
# scale, and those that are a unit of work.
BLOCK = 256
CHUNK = 64 * BLOCK
# int64 that a GPU's kernels count and add up in, as kStepWorkspace and kNormWorkspace there.
STEP_WORKSPACE, NORM_WORKSPACE = 1, 1 + 2048


class Table:
    """Rows that lie on a device."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._tensor: Tensor | None = None
        self._workspace: Tensor | None = None

    def of(self, slots: Sequence[Slot]) -> Tensor:
        """(slots, 14) int64: the columns of StepRow in csrc/common/optimizer.h."""
        return self._holding(_numbered(map(_row, slots)), slots[0].param.device)

    def of_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        """The same for gradients alone, which are contiguous."""
        return self._holding(_numbered(map(_gradient_row, gradients)), gradients[0].device)

    def workspace(self, size: int) -> Tensor:
        """(size,) int64 zeros beside the rows, which each launch leaves as zeros.

        Launches that are under way at once, on streams of their own, need a table each.
        """
        assert self._tensor is not None
        known, device = self._workspace, self._tensor.device
        if known is None or known.device != device or len(known) != size:
            known = self._workspace = torch.zeros(size, dtype=torch.int64, device=device)
        return known

    def _holding(self, rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
        if self._tensor is None or rows != self._rows:
            self._tensor = on_device(torch.tensor(rows, dtype=torch.int64), device)
            self._rows = rows
        return self._tensor


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device, without waiting for it."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _numbered(rows: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The rows, each with the number of chunks before it as its last but one."""
    numbered, chunks = [], 0
    for row in rows:
        numbered.append((*row[:-1], chunks, row[-1]))
        numel, offset = row[8], row[9]
        chunks += -(-(offset % BLOCK + numel) // CHUNK)
    return numbered


def _row(slot: Slot) -> tuple[int, ...]:
    return (
        slot.param.data_ptr(),
        slot.grad.data_ptr(),
        _address(slot.beside),
        _address(slot.first),
        _address(slot.second),
        _address(slot.first_scale),
        _address(slot.second_scale),
        slot.step.data_ptr(),
        slot.param.numel(),
        slot.offset,
        slot.stream,
        slot.group,
        int(slot.grad.dtype == torch.bfloat16),
    )


def _gradient_row(gradient: Tensor) -> tuple[int, ...]:
    is_bf16 = int(gradient.dtype == torch.bfloat16)
    return (0, gradient.data_ptr(), 0, 0, 0, 0, 0, 0, gradient.numel(), 0, 0, 0, is_bf16)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
