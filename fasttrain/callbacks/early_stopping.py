"""Stops when the held-out loss no longer falls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fasttrain.callbacks.held_out import require_held_out
from fasttrain.config.schema.callback import EarlyStoppingConfig
from fasttrain.core.data_report import DataReport
from fasttrain.core.events import Callback, EvaluationRecord

if TYPE_CHECKING:
    from fasttrain.core.run import Run


class EarlyStopping(Callback):
    """Ends the run, as finished, after `patience` evaluations without a new best."""

    Config = EarlyStoppingConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or EarlyStoppingConfig())
        self.best = math.inf
        self.best_step = 0
        self.last_step = -1
        self.without_best = 0

    def on_data_ready(self, run: Run, record: DataReport) -> None:
        require_held_out(record, "early_stopping")

    def on_evaluation_end(self, run: Run, record: EvaluationRecord) -> None:
        if record.step <= self.last_step:
            return  # asked for twice at one step: that is no second chance missed
        self.last_step = record.step
        if record.loss < self.best - self.config.min_delta:
            self.best, self.best_step, self.without_best = record.loss, record.step, 0
            return
        self.without_best += 1
        if self.without_best >= self.config.patience:
            run.stop(
                f"early stopping: {self.without_best} evaluations without a held-out loss below "
                f"{self.best:.3f} (step {self.best_step})",
                finished=True,
            )

    def state_dict(self) -> dict[str, Any]:
        best = self.best if math.isfinite(self.best) else None
        return {
            "best": best,
            "best_step": self.best_step,
            "last_step": self.last_step,
            "without_best": self.without_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = math.inf if state["best"] is None else state["best"]
        self.best_step = state["best_step"]
        self.last_step = state["last_step"]
        self.without_best = state["without_best"]
