"""The loop. It names no model, no kernel and no vendor: those are behind interfaces."""

from __future__ import annotations

import itertools
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, ClassVar

import torch

from fasttrain.config.schema.trainer import TrainerSection
from fasttrain.core.batch import Batch, LossSum, StepBatch
from fasttrain.core.events import (
    Callback,
    EvaluationRecord,
    StepEnd,
    StepStart,
)
from fasttrain.core.interfaces import Examples, LanguageModel
from fasttrain.core.meter import Meter
from fasttrain.core.run import Run
from fasttrain.core.saving import Saver
from fasttrain.runtime.memory import reset_peak_memory


class Trainer(ABC):
    """A training method: what it learns from, and its loss. Subclass it for one of your own."""

    Config: ClassVar[type[TrainerSection]]
    examples: ClassVar[Examples]
    callbacks: ClassVar[tuple[type[Callback], ...]] = ()
    """Callbacks that belong to the method; each is made with `config=None`."""

    def __init__(self, config: Any, run: Run, saver: Saver) -> None:
        self.config = config
        self.run = run
        self.saver = saver
        self.meter = Meter(run)
        run.paused = self.meter.paused

    @abstractmethod
    def loss(self, model: LanguageModel, batch: Batch) -> LossSum:
        """The sum of the batch's token losses, and `batch.num_supervised`."""

    # --- the loop --------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the horizon, or until someone asks for a stop."""
        run = self.run
        run.hooks.emit("train_start")
        reset_peak_memory(run.engine.device)
        self.meter.start()
        if self._evaluation_is_owed():
            self.evaluate()
            if run.checkpoint_requested:
                self._save(self.saver.save_due)
        with closing(self._batches()) as batches:
            while not run.finished and run.stop_reason is None:
                self.step(next(batches))
        run.hooks.emit("train_end")
        self._finish()

    def step(self, batch: StepBatch) -> None:
        """One optimizer step, and what is due after it: log, evaluate, save, stop."""
        run = self.run
        run.hooks.emit("step_start", StepStart(run.step + 1, batch, self._wrapped_loss))
        result = run.engine.train_step(batch.micro_batches, self._wrapped_loss)
        run.last_learning_rate = float(run.scheduler.get_last_lr()[0])
        run.scheduler.step()
        self._advance(batch)
        self.meter.add(result)
        run.hooks.emit("step_end", StepEnd(run.step, batch, result))
        self._ask_for_stops()
        if self._log_is_due():
            self.meter.log(result)
        if self._evaluation_is_due():
            self.evaluate()
        if run.finished and run.interval.steps:  # the evaluation has ended the run
            self.meter.log(result)
        if self.saver.is_due():
            self._save(self.saver.save_due)

    def evaluate(self) -> EvaluationRecord:
        """The held-out loss, weighted by tokens."""
        run = self.run
        with self.meter.paused():
            with run.engine.evaluation_weights():
                record: EvaluationRecord = run.hooks.call("evaluate", self._evaluate)
            run.evaluation_requested = False
            run.eval_loss, run.eval_step = record.loss, record.step
            if record.is_best:
                run.best_eval_loss, run.best_step = record.loss, record.step
                if run.config.eval.save_best and run.step > 0:
                    run.request_checkpoint()
            run.hooks.emit("evaluation_end", record)
        return record

    def _save(self, save: Callable[[], None]) -> None:
        with self.meter.paused():
            save()

    # --- its parts -------------------------------------------------------------------------------

    def _wrapped_loss(self, batch: Batch) -> LossSum:
        loss: LossSum = self.run.hooks.call("loss", self.loss, self.run.model, batch)
        return loss

    def _batches(self) -> Generator[StepBatch, None, None]:
        run = self.run
        if not run.config.overfit_first_batch:
            return run.data.train.stream(run.epoch, run.step_in_epoch)
        with closing(run.data.train.stream(0, 0)) as stream:
            first = next(stream)
        return (_at(first, number) for number in itertools.count(run.step))

    def _advance(self, batch: StepBatch) -> None:
        run = self.run
        run.step += 1
        run.steps_this_process += 1
        run.epoch, run.step_in_epoch = batch.epoch, batch.step_in_epoch + 1
        if run.step_in_epoch == batch.steps_in_epoch:
            run.epoch, run.step_in_epoch = batch.epoch + 1, 0

    def _ask_for_stops(self) -> None:
        run, stop_after = self.run, self.run.config.stop_after
        if run.finished:
            return
        if stop_after is not None and run.steps_this_process >= stop_after:
            run.stop(f"stop_after: {stop_after} steps of this process are done")
        if os.path.exists(kill_file(run)):
            run.stop(f"the kill file {kill_file(run)} is there")

    def _log_is_due(self) -> bool:
        # Not at a stop: the resumed run logs the interval whole, as an uninterrupted run would.
        return self.run.finished or self.run.step % self.run.config.logging.every_steps == 0

    def _evaluation_is_due(self) -> bool:
        run = self.run
        if run.data.evaluation is None:
            return False
        if run.finished:
            return run.evaluation_requested or run.config.eval.at_end
        # Who stops a run waits for its checkpoint; the next start evaluates.
        stopped = run.stop_reason is not None
        return not stopped and (run.evaluation_requested or self._evaluation_is_scheduled())

    def _evaluation_is_scheduled(self) -> bool:
        run = self.run
        every = run.config.eval.every_steps or max(run.total_steps // 10, 1)
        return run.step % every == 0

    def _evaluation_is_owed(self) -> bool:
        """Before the first step: the one at the start, or the one that a stop has put off."""
        run = self.run
        if run.data.evaluation is None or run.finished or run.eval_step == run.step:
            return False
        return run.config.eval.at_start if run.step == 0 else self._evaluation_is_scheduled()

    def _evaluate(self) -> EvaluationRecord:
        run = self.run
        assert run.data.evaluation is not None, "there are no held-out data"
        started = time.perf_counter()
        sums = torch.zeros(2, dtype=torch.float64, device=run.engine.device)
        batches = run.data.evaluation.batches()
        for batch in itertools.islice(batches, run.config.eval.max_batches):
            part = run.engine.eval_forward(batch, self._wrapped_loss)
            sums[0] += part.sum
            sums[1] += part.count
        total, count = run.engine.sum_over_ranks(sums).tolist()
        loss = total / count if count else float("nan")
        return EvaluationRecord(
            step=run.step,
            loss=loss,
            supervised_tokens=int(count),
            seconds=time.perf_counter() - started,
            is_best=loss < (math.inf if run.best_eval_loss is None else run.best_eval_loss),
        )

    def _finish(self) -> None:
        run = self.run
        if run.finished:
            # A run that was killed after its last step comes here without stepping.
            if (
                run.data.evaluation is not None
                and run.config.eval.at_end
                and run.eval_step != run.step
            ):
                self.evaluate()
            self._save(self.saver.save_at_end)
        else:
            self._save(self.saver.save_resumable)


def kill_file(run: Run) -> str:
    """The file whose appearance stops the run."""
    return run.config.kill_file or str(run.directory / "STOP")


def _at(batch: StepBatch, number: int) -> StepBatch:
    """The same batch as if it were the `number`-th (0-based) of the run."""
    epoch, step_in_epoch = divmod(number, batch.steps_in_epoch)
    return StepBatch(epoch, step_in_epoch, batch.steps_in_epoch, batch.micro_batches)
