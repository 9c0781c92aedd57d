"""Sums over a logged interval, kept on the device so that the loop never waits for one step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fasttrain.core.batch import StepResult
from fasttrain.core.events import LogRecord
from fasttrain.core.run import Interval, Run
from fasttrain.runtime.memory import peak_memory_bytes


class Meter:
    """Adds up step results; `settle` brings the sums to the host, `log` makes a record of them.

    The sums are fp64 and added in step order, and a checkpoint carries them: a resumed run logs the
    same bits. A skipped step counts its tokens as seen, and nothing of its loss.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._sums: dict[str, Tensor] = {}
        self._clock = time.perf_counter()

    def start(self) -> None:
        """Begin to measure, from the run's restored interval."""
        interval = self.run.interval
        self._sums = {
            "loss": self._scalar(interval.loss_sum),
            "counted": self._scalar(interval.counted_tokens),
            "skipped": self._scalar(interval.skipped_steps),
            **{f"extra/{name}": self._scalar(v) for name, v in interval.extras.items()},
        }
        self._clock = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Count one step. Nothing here waits for the device."""
        kept = ~result.skipped
        self._add("loss", torch.where(kept, result.loss_sum, 0.0))
        self._add("counted", kept * result.num_supervised)
        self._add("skipped", result.skipped)
        for name, value in result.extras.items():
            self._add(f"extra/{name}", torch.where(kept, value, 0.0))
        interval, run = self.run.interval, self.run
        interval.steps += 1
        interval.tokens += result.num_tokens
        interval.supervised_tokens += result.num_supervised
        run.tokens += result.num_tokens
        run.supervised_tokens += result.num_supervised

    def settle(self) -> None:
        """Bring the device's sums into `run.interval`. Waits for the device."""
        interval = self.run.interval
        sums = {name: value.item() for name, value in self._sums.items()}
        interval.loss_sum = sums["loss"]
        interval.counted_tokens = int(sums["counted"])
        interval.skipped_steps = int(sums["skipped"])
        interval.extras = {
            name.removeprefix("extra/"): v for name, v in sums.items() if name.startswith("extra/")
        }

    def log(self, last: StepResult) -> None:
        """Emit the interval's record and begin the next."""
        self.settle()
        run, interval = self.run, self.run.interval
        now = time.perf_counter()
        seconds = interval.seconds + now - self._clock
        counted = interval.counted_tokens
        run.loss = interval.loss_sum / counted if counted else float("nan")
        record = LogRecord(
            step=run.step,
            epoch=run.epochs_done,
            loss=run.loss,
            lr=run.last_learning_rate,
            grad_norm=last.grad_norm.item(),
            tokens=interval.tokens,
            supervised_tokens=interval.supervised_tokens,
            tokens_per_second=interval.tokens / seconds,
            step_seconds=seconds / interval.steps,
            peak_memory_bytes=peak_memory_bytes(run.engine.device),
            skipped_steps=interval.skipped_steps,
            extras={
                **{name: value / max(counted, 1) for name, value in interval.extras.items()},
                **interval.metrics,
            },
        )
        run.interval = Interval()
        self.start()
        run.hooks.emit("log", record)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here (evaluation, saving) is not the training's.

        Steps that the device has not finished yet are: they are waited for first.
        """
        self.settle()
        self.run.interval.seconds += time.perf_counter() - self._clock
        yield
        self._clock = time.perf_counter()

    def _add(self, name: str, value: Tensor) -> None:
        # No zero to begin with: a number that the host puts on the device makes the host wait.
        value = value.to(torch.float64)
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.run.engine.device)
