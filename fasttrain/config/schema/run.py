"""`eval:` and `logging:`"""

from __future__ import annotations

from typing import Literal

from fasttrain.config.schema.base import PositiveInt, Section


class EvalConfig(Section):
    """When the held-out data are evaluated. The loss is weighted by tokens."""

    every_steps: PositiveInt | None = None
    """Evaluate each n optimizer steps. Default: ten times in a run."""
    at_start: bool = False
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    max_batches: PositiveInt | None = None
    """Batches of one evaluation. Default: all of them."""
    save_best: bool = True
    """Write a checkpoint whenever the loss is the lowest yet, and keep it."""


class LoggingConfig(Section):
    """What is printed and written while training."""

    every_steps: PositiveInt = 10
    """Optimizer steps between two lines, in the console and in metrics.jsonl."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message shown."""
