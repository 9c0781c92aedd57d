"""metrics.jsonl: what a run measured, a line at a time."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, TextIO

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.callback import MetricsFileConfig
from fasttrain.core.events import Callback, EvaluationRecord, LogRecord, Result

if TYPE_CHECKING:
    from fasttrain.core.run import Run

NAME = "metrics.jsonl"

LOG_FIELDS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "step_seconds",
    "peak_memory_bytes",
)


class MetricsFile(Callback):
    """Appends a line for each logged step and each evaluation, at once, so that a crash loses none.

    Floats are written so that reading them gives the same bits. JSON knows no NaN or infinity: a
    value that is not finite is `null`.
    """

    Config = MetricsFileConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._file: TextIO | None = None

    def on_log(self, run: Run, record: LogRecord) -> None:
        self._write(run, log_line(record))

    def on_evaluation_end(self, run: Run, record: EvaluationRecord) -> None:
        self._write(run, evaluation_line(record))

    def on_run_end(self, run: Run, record: Result) -> None:
        self._close()

    def on_error(self, run: Run, record: BaseException) -> None:
        self._close()

    def _write(self, run: Run, values: dict[str, Any]) -> None:
        if run.engine.topology.rank != 0:
            return
        if self._file is None:
            # Opened with the first line: a dry run leaves nothing behind.
            self._file = open(run.directory / NAME, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._file.write(json.dumps(values, allow_nan=False) + "\n")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def log_line(record: LogRecord) -> dict[str, Any]:
    """The record's ten fields, `skipped_steps` where there were any, and the loss's extras."""
    values: dict[str, Any] = {name: _strict(getattr(record, name)) for name in LOG_FIELDS}
    if record.skipped_steps:
        values["skipped_steps"] = record.skipped_steps
    for name, value in record.extras.items():
        if name in LOG_FIELDS or name == "skipped_steps":
            raise UserError(
                Problem(
                    what=f"the loss returned an extra named '{name}', a name that is taken.",
                    key="LossSum.extras",
                    hint="Give it another name.",
                )
            )
        values[name] = _strict(value)
    return values


def evaluation_line(record: EvaluationRecord) -> dict[str, Any]:
    """One evaluation."""
    return {
        "step": record.step,
        "eval_loss": _strict(record.loss),
        "eval_supervised_tokens": record.supervised_tokens,
        "eval_seconds": record.seconds,
    }


def _strict(value: float) -> float | None:
    return value if math.isfinite(value) else None
