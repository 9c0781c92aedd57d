"""Scalars for TensorBoard."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.callback import TensorBoardConfig
from fasttrain.core.events import Callback, EvaluationRecord, LogRecord, Result

if TYPE_CHECKING:
    from fasttrain.core.run import Run


class TensorBoard(Callback):
    """Writes to `tensorboard/` of the run directory; a resumed run goes on with its curves."""

    Config = TensorBoardConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                Problem(
                    key="callbacks: tensorboard",
                    what="the package tensorboard is not installed.",
                    hint="Install the extra: pip install 'fasttrain-llm[tensorboard] @ .', or take "
                    "the callback out.",
                )
            )
        self._writer: Any = None

    def on_log(self, run: Run, record: LogRecord) -> None:
        scalars = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/learning_rate": record.lr,
            "train/epoch": record.epoch,
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/step_seconds": record.step_seconds,
            "memory/peak_bytes": record.peak_memory_bytes,
            **{f"train/{name}": value for name, value in record.extras.items()},
        }
        self._write(run, record.step, scalars)

    def on_evaluation_end(self, run: Run, record: EvaluationRecord) -> None:
        self._write(run, record.step, {"eval/loss": record.loss})

    def on_run_end(self, run: Run, record: Result) -> None:
        self._close()

    def on_error(self, run: Run, record: BaseException) -> None:
        self._close()

    def _write(self, run: Run, step: int, scalars: dict[str, float]) -> None:
        if run.engine.topology.rank != 0:
            return
        if self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            # What a killed process wrote from this step on is hidden: it is written again.
            self._writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=step)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
