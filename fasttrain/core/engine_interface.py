"""What an engine is to the trainer: how a step runs, and where its state lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from fasttrain.config.schema.base import ComponentSection
from fasttrain.core.batch import Batch, LossFunction, LossSum, StepResult
from fasttrain.core.interfaces import LanguageModel, Topology
from fasttrain.runtime.precision import Precision

if TYPE_CHECKING:
    from fasttrain.core.events import Hooks

T = TypeVar("T")


@dataclass(frozen=True)
class NamedSlice:
    """A piece of a tensor by name: elements [offset, offset + tensor.numel()) of the flat whole.

    `kind` is "model" or "optimizer"; optimizer names are `<parameter name>/<state name>`.
    """

    kind: Literal["model", "optimizer"]
    name: str
    tensor: Tensor
    global_shape: tuple[int, ...]
    offset: int = 0


class Engine(ABC):
    """How a step runs. The trainer sees nothing else of devices, processes or vendors."""

    Config: ClassVar[type[ComponentSection]]
    topology: Topology
    device: torch.device

    def __init__(self, config: Any, *, precision: Precision, device: torch.device) -> None:
        self.config = config
        self.precision = precision
        self.device = device

    @abstractmethod
    def model_init_context(self) -> AbstractContextManager[None]:
        """Entered while the model is created."""

    @abstractmethod
    def attach(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float,
        hooks: Hooks,
    ) -> None:
        """Take the model and the optimizer under control."""

    @abstractmethod
    def train_step(self, micro_batches: Iterable[Batch], loss: LossFunction) -> StepResult:
        """Forward and backward of every micro-batch of one optimizer step, clip, step, zero."""

    @abstractmethod
    def eval_forward(self, batch: Batch, loss: LossFunction) -> LossSum:
        """A micro-batch's loss without gradient, in evaluation mode."""

    @abstractmethod
    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """What `make()` gives on rank 0, on every rank: for decisions that all must share."""

    @abstractmethod
    def loss_and_gradients(
        self, batch: Batch, loss: LossFunction
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's loss per supervised token () and the gradient of each trained parameter,
        by name, computed as in a step: in training mode, autocast around the forward pass alone.

        For who compares: `.grad`, optimizer and buffers stay as they are, and wrappers of
        `backward` aren't called. Each rank has its own micro-batch; nothing is summed over them.
        """

    @abstractmethod
    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` (n,) fp64 added up over the data-parallel ranks."""

    @abstractmethod
    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Whole parameters are at hand inside this context."""

    @abstractmethod
    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Inside, the weights are those that the model is meant to be used with: the average of an
        optimizer that keeps one. Afterwards they have the bits of before. It may be entered twice.
        """

    @abstractmethod
    def optimizer_numbers(self) -> dict[str, Any]:
        """What the optimizer's state holds beside tensors and learning rates, as JSON."""

    @abstractmethod
    def load_optimizer_numbers(self, saved: dict[str, Any]) -> None:
        """The inverse; ValueError where it doesn't fit the optimizer."""

    @abstractmethod
    def state_slices(self) -> Iterator[NamedSlice]:
        """This rank's part of the model and of the optimizer's state."""

    @abstractmethod
    def load_slices(self, slices: Iterable[NamedSlice]) -> None:
        """The inverse; a missing or surplus name is a ValueError that lists them."""
