"""What a step of an optimizer is told: tensors, numbers, and what decides at the step itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from fasttrain_kernels.ops.optimizer_step.table import BLOCK, Table

Algorithm = Literal["adamw", "lion", "sgd"]
# How a parameter is kept: as it is, beside a float32 master, or in 16 bits alone.
Rounding = Literal["none", "master", "stochastic", "kahan"]
Moments = Literal["none", "float32", "bfloat16", "8bit"]


@dataclass
class Slot:
    """One tensor of a step: a parameter, its gradient, and its state. Contiguous, on one device."""

    param: Tensor
    grad: Tensor
    step: Tensor  # () float32: steps taken
    first: Tensor | None  # exp_avg or momentum_buffer: float32, bfloat16, or uint8 codes
    second: Tensor | None  # exp_avg_sq; with 8 bits codes of its root
    first_scale: Tensor | None  # (blocks,) float32, with 8 bits
    second_scale: Tensor | None
    beside: Tensor | None  # float32 master, or bfloat16 compensation
    stream: int  # of random bits: the number of the whole tensor
    offset: int  # the element of the whole tensor that this one begins at
    group: int

    @property
    def lead(self) -> int:
        """How many elements of its first block lie before the slot."""
        return self.offset % BLOCK

    @property
    def blocks(self) -> int:
        return -(-(self.lead + self.param.numel()) // BLOCK)


class Numbers(NamedTuple):
    """What the slots of a group share. The order is that of GroupNumbers in the C++."""

    lr: float
    beta1: float  # sgd: momentum
    beta2: float  # sgd: dampening
    eps: float
    weight_decay: float
    nesterov: float = 0.0  # 1: yes
    sign: float = 1.0  # -1: maximize


@dataclass(frozen=True)
class Step:
    """A step of slots that are kept alike."""

    algorithm: Algorithm
    rounding: Rounding
    moments: Moments
    slots: Sequence[Slot]
    numbers: Tensor  # (groups, 7) float64, on the slots' device: Numbers
    table: Table  # of the slots, for kernels that read one
    norm: Tensor | None = None  # () float32: of the gradients as they lie there
    max_norm: float = 0.0  # 0: no clipping
    grad_scale: Tensor | None = None  # () float32: what gradients were multiplied by
    skip: Tensor | None = None  # () float32: other than 0 leaves everything as it is
    seed: int = 0  # of random bits
    zero_grad: bool = False
