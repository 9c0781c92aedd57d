"""What the user sees of a run: the first screen, its progress and a summary."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from fasttrain.callbacks.progress import (
    checkpoint_line,
    evaluation_line,
    progress_line,
    resumed_lines,
)
from fasttrain.callbacks.screen import (
    LABEL_WIDTH,
    data_section,
    kernel_section,
    model_section,
    optimizer_section,
    plan_section,
    sample_section,
)
from fasttrain.callbacks.summary import Seen, summary_section
from fasttrain.config.schema.callback import ConsoleConfig
from fasttrain.core.data_report import DataReport
from fasttrain.core.events import (
    Callback,
    CheckpointRecord,
    EvaluationRecord,
    LogRecord,
    Result,
    Resumed,
    StepEnd,
)
from fasttrain.core.interfaces import LanguageModel
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.runtime.log import configure, escape_controls, output

if TYPE_CHECKING:
    from fasttrain.core.run import Run

REDRAW_SECONDS = 0.1


class Console(Callback):
    """Prints each part of the first screen as soon as it is known, then one line of progress."""

    Config = ConsoleConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or ConsoleConfig())
        self.seen = Seen()
        self._plan_is_shown = False
        self._log: LogRecord | None = None
        self._started = time.monotonic()
        self._drawn = 0.0

    # --- the first screen ------------------------------------------------------------------------

    def on_run_start(self, run: Run, record: None) -> None:
        configure(style=self.config.style, level=run.config.logging.level)
        output().print(escape_controls(f"fasttrain · {run.config.type} · {run.directory}"))

    def on_data_ready(self, run: Run, record: DataReport) -> None:
        output().print(*data_section(record), indent=LABEL_WIDTH)
        sample = sample_section(record.sample, colour=output().has_colour)
        output().print(*sample, indent=LABEL_WIDTH)

    def on_kernels_selected(self, run: Run, record: KernelPlan) -> None:
        output().print(*kernel_section(record), indent=LABEL_WIDTH)

    def on_model_created(self, run: Run, record: LanguageModel) -> None:
        output().print(*model_section(record), indent=LABEL_WIDTH)

    def on_optimizer_created(self, run: Run, record: torch.optim.Optimizer) -> None:
        output().print(*optimizer_section(record), indent=LABEL_WIDTH)

    def on_resumed(self, run: Run, record: Resumed) -> None:
        self._show_plan(run)
        output().print(*map(escape_controls, resumed_lines(record)))

    def _show_plan(self, run: Run) -> None:
        """Once, when every choice is made: before the first step, or where a dry run ends."""
        if not self._plan_is_shown:
            self._plan_is_shown = True
            output().print(*plan_section(run.notes), indent=LABEL_WIDTH)

    # --- progress --------------------------------------------------------------------------------

    def on_train_start(self, run: Run, record: None) -> None:
        self._show_plan(run)
        self._started = time.monotonic()

    def on_step_end(self, run: Run, record: StepEnd) -> None:
        # Between two logged steps only the counter moves: a loss is read when it is logged.
        if self._log is None or not output().redraws:
            return
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw(run, self._log)

    def on_log(self, run: Run, record: LogRecord) -> None:
        self._log = record
        if output().redraws:
            self._draw(run, record)
        else:
            output().print(self._line(run, record))

    def on_evaluation_end(self, run: Run, record: EvaluationRecord) -> None:
        if self.seen.first_held_out is None:
            self.seen.first_held_out = (record.step, record.loss)
        output().print(evaluation_line(record))

    def on_checkpoint_saved(self, run: Run, record: CheckpointRecord) -> None:
        self.seen.saved[record.kind] = record.path
        output().print(escape_controls(checkpoint_line(record)))

    def _draw(self, run: Run, record: LogRecord) -> None:
        self._drawn = time.monotonic()
        output().progress(self._line(run, record, width=output().console.width))

    def _line(self, run: Run, record: LogRecord, width: int | None = None) -> str:
        return progress_line(
            record,
            step=run.step,
            total_steps=run.total_steps,
            eta_seconds=self._eta(run),
            width=width,
        )

    def _eta(self, run: Run) -> float | None:
        """Seconds to the horizon at this process's pace, evaluations and saves included."""
        if not run.steps_this_process or run.step >= run.total_steps:
            return None
        elapsed = time.monotonic() - self._started
        return elapsed / run.steps_this_process * (run.total_steps - run.step)

    # --- the end ---------------------------------------------------------------------------------

    def on_train_end(self, run: Run, record: None) -> None:
        output().end_progress()

    def on_run_end(self, run: Run, record: Result) -> None:
        self._show_plan(run)
        output().end_progress()
        seconds = time.monotonic() - self._started
        output().print(*summary_section(run, record, self.seen, seconds), indent=LABEL_WIDTH)

    def on_error(self, run: Run, record: BaseException) -> None:
        output().end_progress()

    # What the summary tells of earlier processes of this run.
    def state_dict(self) -> dict[str, Any]:
        first = self.seen.first_held_out
        return {"first_held_out": None if first is None else list(first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        first = state["first_held_out"]
        self.seen.first_held_out = None if first is None else (first[0], first[1])
