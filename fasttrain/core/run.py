"""The state of one training run: what callbacks see, and what they may ask for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.core import run_state

if TYPE_CHECKING:
    import torch

    from fasttrain.config.schema.root import TrainConfig
    from fasttrain.core.engine_interface import Engine
    from fasttrain.core.events import Hooks
    from fasttrain.core.interfaces import LanguageModel, PreparedData
    from fasttrain.core.kernel_plan import KernelPlan


SAVE_FAILED = 3  # exit code: training went on, the last save failed

# A block that is not created yet. Typed as present: who sees it early comes before its event.
LATER: Any = None


@dataclass
class Interval:
    """Sums since the last logged step; saved, so that a resumed run logs the same lines."""

    loss_sum: float = 0.0
    counted_tokens: int = 0  # supervised ones of the steps that were not skipped
    supervised_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    extras: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # what callbacks add to the log as is


@dataclass
class Run:
    """One training run. Blocks are set as they are created; counters are global over all ranks."""

    config: TrainConfig
    directory: Path
    hooks: Hooks
    run_id: str
    resolved_config: str = ""  # every value with its origin, as config.resolved.yaml holds it
    dry_run: bool = False  # nothing may be written under `directory`
    resume_from: Path | None = None  # the checkpoint that the run goes on from

    # Blocks, in the order of their creation.
    engine: Engine = LATER
    data: PreparedData = LATER
    tokenizer: Any = LATER
    model: LanguageModel = LATER
    kernels: KernelPlan = LATER
    optimizer: torch.optim.Optimizer = LATER
    scheduler: torch.optim.lr_scheduler.LRScheduler = LATER

    # Horizon and position. `step` counts finished optimizer steps; the next batch is
    # (epoch, step_in_epoch), both 0-based.
    total_steps: int = 0
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    steps_this_process: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    interval: Interval = field(default_factory=Interval)
    last_learning_rate: float = 0.0  # of the last finished step

    # The last logged loss, and evaluation: nats per supervised token.
    loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None  # when eval_loss was taken
    best_eval_loss: float | None = None
    best_step: int | None = None

    # Facts for the first screen that no block owns: one line each, as (what, choice and reason).
    notes: list[tuple[str, str]] = field(default_factory=list)
    # Facts for the summary at the end, by label; a later one replaces an earlier one.
    summary: dict[str, str] = field(default_factory=dict)

    # `with run.paused():` what happens inside is no part of the training's time. Steps that the
    # device has not finished yet are, and are waited for first.
    paused: Callable[[], AbstractContextManager[None]] = nullcontext

    # The kinds of checkpoint whose last save failed.
    failed_saves: set[str] = field(default_factory=set)

    # Requests, and how the run ends.
    stop_reason: str | None = None
    stop_finishes: bool = False
    stop_code: int = 0
    checkpoint_requested: bool = False
    evaluation_requested: bool = False

    def stop(self, reason: str, *, finished: bool = False, exit_code: int = 0) -> None:
        """Ask for an end after the present step. The first reason stands.

        `finished` says the run reached its aim (early stopping): the model is exported as at the
        end of the horizon. Otherwise only a resumable checkpoint is written; a later start goes on.
        """
        if self.stop_reason is None:
            self.stop_reason = reason
            self.stop_finishes = finished
            self.stop_code = exit_code

    @property
    def exit_code(self) -> int:
        """Of the process, if the run ended now: a save that failed goes before why it stopped."""
        return SAVE_FAILED if self.failed_saves else self.stop_code

    def request_checkpoint(self) -> None:
        """Ask for a resumable checkpoint after the present step."""
        self.checkpoint_requested = True

    def request_evaluation(self) -> None:
        """Ask for an evaluation after the present step."""
        self.evaluation_requested = True

    @property
    def finished(self) -> bool:
        """The whole horizon was trained, or a callback declared the aim reached."""
        return self.step >= self.total_steps or (
            self.stop_reason is not None and self.stop_finishes
        )

    @property
    def epochs_done(self) -> float:
        """Passes over the data so far."""
        return self.epoch + self.step_in_epoch / self.data.train.steps_in_epoch(self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run beside tensors, as JSON (core/run_state.py)."""
        return run_state.state_dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse, for a run whose blocks are built."""
        run_state.load_state_dict(self, state)
