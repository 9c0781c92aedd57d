"""Warm-up, then the peak rate."""

from __future__ import annotations

from fasttrain.config.schema.scheduler import ConstantConfig
from fasttrain.core.interfaces import SchedulerFactory
from fasttrain.scheduler.warmup import warmup_factor, warmup_steps


class ConstantFactory(SchedulerFactory):
    """1 after the warm-up."""

    Config = ConstantConfig

    def factor(self, step: int, total_steps: int) -> float:
        return warmup_factor(step, warmup_steps(self.config, total_steps))
