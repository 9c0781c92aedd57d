"""When checkpoints are written, and what happens when one can't be."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from fasttrain.core.checkpoint_interface import Checkpoint, ResumableCheckpoint, UnfitToSave
from fasttrain.core.events import CheckpointRecord
from fasttrain.core.run import Run

log = logging.getLogger("fasttrain")


class Saver:
    """The run's checkpoints. A failed save is told, training goes on, and the next one is tried."""

    def __init__(self, run: Run, checkpoints: Iterable[Checkpoint]) -> None:
        self.run = run
        self.checkpoints = tuple(checkpoints)
        self._saved_at: dict[Checkpoint, int] = {}

    def is_due(self) -> bool:
        """Whether anything is to be written after the present step."""
        return self.run.checkpoint_requested or any(map(self._on_schedule, self.checkpoints))

    def save_due(self) -> None:
        """Write what is due; a request is for the resumable ones."""
        requested, self.run.checkpoint_requested = self.run.checkpoint_requested, False
        for checkpoint in self.checkpoints:
            asked = requested and isinstance(checkpoint, ResumableCheckpoint)
            if asked or self._on_schedule(checkpoint):
                self._save(checkpoint)

    def save_at_end(self) -> None:
        """Write what the end of training calls for."""
        self.save_due()
        for checkpoint in self.checkpoints:
            if checkpoint.config.at_end:
                self._save(checkpoint)

    def save_resumable(self) -> None:
        """Write what a later start needs to go on."""
        self.run.checkpoint_requested = True
        self.save_due()

    def _on_schedule(self, checkpoint: Checkpoint) -> bool:
        every = checkpoint.config.every_steps
        return every is not None and self.run.step % every == 0

    def _save(self, checkpoint: Checkpoint) -> None:
        run = self.run
        if self._saved_at.get(checkpoint) == run.step:
            return
        started = time.perf_counter()
        try:
            path = run.hooks.call("save_checkpoint", checkpoint.save, run)
        except (OSError, UnfitToSave) as error:
            run.failed_saves.add(checkpoint.config.type)
            log.warning("step %d could not be saved: %s. Training goes on.", run.step, error)
            return
        run.failed_saves.discard(checkpoint.config.type)
        self._saved_at[checkpoint] = run.step
        seconds = time.perf_counter() - started
        record = CheckpointRecord(run.step, checkpoint.config.type, path, seconds)
        run.hooks.emit("checkpoint_saved", record)
