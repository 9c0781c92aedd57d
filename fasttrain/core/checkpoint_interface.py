"""What writes checkpoints of a run, and brings it back from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fasttrain.config.schema.base import ComponentSection

if TYPE_CHECKING:
    from fasttrain.core.run import Run


class UnfitToSave(ValueError):  # noqa: N818  (it names a state, not a fault of the code)
    """The weights are not finite: a checkpoint of them must not pass for a good one."""


class Checkpoint(ABC):
    """Writes one kind of checkpoint."""

    Config: ClassVar[type[ComponentSection]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def save(self, run: Run) -> Path:
        """Write the run's present state; complete or absent.

        OSError when the disk refuses, UnfitToSave when the weights are not finite.
        """


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint of a run directory, and what was passed over and why."""

    path: Path | None
    skipped: tuple[str, ...] = ()


class ResumableCheckpoint(Checkpoint):
    """A checkpoint that a run can go on from, exactly."""

    @abstractmethod
    def find(self, directory: Path, *, run_id: str | None = None) -> Found:
        """The newest complete checkpoint of a run directory, or `directory` if it is one itself.

        With `run_id`, those of other runs are passed over.
        """

    @abstractmethod
    def restore(self, run: Run, path: Path) -> None:
        """Put the run, its blocks and the random states back to what they were at `path`."""
