"""What a step is made of: batches, losses, results.

Shapes: T tokens of a batch, S supervised ones among them, D documents. A batch is always flat:
documents lie one after the other in one row of T tokens, and `cu_seqlens` says where each begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED_LABEL = -100


class Layout(Protocol):
    """What kernels need to know about document lengths, computed on the CPU with the batch."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document, in order; host integers, so that using them never syncs."""

    def to(self, device: torch.device) -> Layout:
        """The same with what kernels read on `device`."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `labels[i]` is already the target of position i; losses never shift."""

    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64; IGNORED_LABEL where nothing is learnt, and at each document's end
    position_ids: Tensor  # (T,) int64, from 0 in each document
    cu_seqlens: Tensor  # (D + 1,) int32, from 0 to T
    supervised_index: Tensor  # (S,) int64, the positions whose label is learnt, rising
    layout: Layout
    num_supervised: int  # S, on the host
    sources: tuple[str, ...]  # (D,) the source of each document

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; asynchronous from pinned memory."""
        if self.input_ids.device == device:
            return self
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            supervised_index=self.supervised_index.to(device, non_blocking=True),
            layout=self.layout.to(device),
        )


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one optimizer step."""

    epoch: int  # 0-based
    step_in_epoch: int  # 0-based
    steps_in_epoch: int
    micro_batches: tuple[Batch, ...]


@dataclass(frozen=True)
class LossSum:
    """A micro-batch's loss: the sum over its supervised tokens, and how many they were.

    A mean is taken once, over the whole global batch, so that the loss of a step does not depend on
    how it was split. `extras` are further sums (device scalars) that appear in the log divided by
    the same count.
    """

    sum: Tensor  # () fp32, on the device, with gradient
    count: int
    extras: Mapping[str, Tensor] = field(default_factory=dict)


LossFunction = Callable[[Batch], LossSum]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step was, over all ranks. Tensors stay on the device: nothing syncs."""

    loss_sum: Tensor  # () fp32: Σ token losses of the global batch
    num_supervised: int  # of the global batch
    num_tokens: int  # of the global batch, nothing padded
    grad_norm: Tensor  # () fp32, before clipping
    skipped: Tensor  # () bool: the loss or the norm was not finite, and no weight changed
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchProfile:
    """What a kernel's choice may depend on: the batches this run will see."""

    device: torch.device
    dtype: torch.dtype  # of activations
    tokens: int  # of a full micro-batch
    document_lengths: tuple[int, ...]  # a sample, for histograms
    supervised_tokens: int = 0  # of those, on average; 0: not known
    # Ops that the optimizer's step is made of, with the facts that their kernels are chosen by.
    optimizer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
