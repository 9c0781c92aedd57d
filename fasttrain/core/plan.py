"""The arithmetic of batches and of the horizon."""

from __future__ import annotations

from dataclasses import dataclass

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.root import TrainConfig
from fasttrain.core.interfaces import TrainingData


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is split, in packs (rows, when unpacked)."""

    micro_batch_size: int
    accumulation: int
    data_parallel_size: int
    unit: str = "packs"

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation * self.data_parallel_size

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} {self.unit} per step = {self.micro_batch_size} micro × "
            f"{self.accumulation} accumulation × {self.data_parallel_size} data-parallel"
        )


def plan_batches(config: TrainConfig, data_parallel_size: int) -> BatchPlan:
    """Split the global batch. UserError with the arithmetic where it leaves a remainder."""
    micro, given = config.micro_batch_size, config.gradient_accumulation_steps
    unit = "packs" if config.data.packing else "rows"
    if config.global_batch_size is None:
        return BatchPlan(micro, given or 1, data_parallel_size, unit)
    accumulation, rest = divmod(config.global_batch_size, micro * data_parallel_size)
    if rest or accumulation == 0 or (given is not None and given != accumulation):
        factors = f"{micro} micro × {data_parallel_size} data-parallel"
        accumulates = "" if given is None else f" × {given} accumulation"
        raise UserError(
            Problem(
                key="global_batch_size",
                what=f"{config.global_batch_size} is not {factors}{accumulates}.",
                hint="Change one of them so that the product is right, or leave out "
                "gradient_accumulation_steps and take a multiple.",
            )
        )
    return BatchPlan(micro, accumulation, data_parallel_size, unit)


@dataclass(frozen=True)
class Horizon:
    """Optimizer steps of the run, and why so many."""

    total_steps: int
    reason: str


def plan_horizon(config: TrainConfig, data: TrainingData) -> Horizon:
    """`epochs` or `max_steps`, whichever ends first; one epoch where neither is given."""
    if config.epochs is None and config.max_steps is not None:
        return Horizon(config.max_steps, f"{config.max_steps} steps: max_steps")
    epochs = 1.0 if config.epochs is None else config.epochs
    steps = _steps_of_epochs(epochs, data)
    if config.max_steps is not None and config.max_steps < steps:
        why = f"max_steps ends before {epochs:g} epochs ({steps} steps)"
        return Horizon(config.max_steps, f"{config.max_steps} steps: {why}")
    default = " (default)" if config.epochs is None else ""
    if config.max_steps is not None:
        default = f", before max_steps ({config.max_steps})"
    return Horizon(steps, f"{steps} steps: {epochs:g} epochs{default}")


def _steps_of_epochs(epochs: float, data: TrainingData) -> int:
    whole = int(epochs)
    steps = sum(data.steps_in_epoch(epoch) for epoch in range(whole))
    if epochs > whole:
        steps += round((epochs - whole) * data.steps_in_epoch(whole))
    return max(steps, 1)
