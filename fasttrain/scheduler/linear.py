"""Warm-up, then a straight line down."""

from __future__ import annotations

from fasttrain.config.schema.scheduler import LinearConfig
from fasttrain.core.interfaces import SchedulerFactory
from fasttrain.scheduler.warmup import decay_progress, warmup_factor, warmup_steps


class LinearFactory(SchedulerFactory):
    """(1 − p) + min_ratio · p, where p goes from 0 at the peak to 1 just after the last step."""

    Config = LinearConfig

    def factor(self, step: int, total_steps: int) -> float:
        warmup = warmup_steps(self.config, total_steps)
        if step < warmup:
            return warmup_factor(step, warmup)
        progress = decay_progress(step, max(warmup - 1, 0), total_steps)
        ratio: float = self.config.min_ratio
        return (1.0 - progress) + ratio * progress
