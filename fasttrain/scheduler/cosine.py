"""Warm-up, then half a cosine down (arXiv 1608.03983, one cycle without restart)."""

from __future__ import annotations

import math

from fasttrain.config.schema.scheduler import CosineConfig
from fasttrain.core.interfaces import SchedulerFactory
from fasttrain.scheduler.warmup import decay_progress, warmup_factor, warmup_steps


class CosineFactory(SchedulerFactory):
    """c + min_ratio · (1 − c) with c = (1 + cos πp) / 2, where p goes from 0 at the peak to 1
    just after the last step."""

    Config = CosineConfig

    def factor(self, step: int, total_steps: int) -> float:
        warmup = warmup_steps(self.config, total_steps)
        if step < warmup:
            return warmup_factor(step, warmup)
        progress = decay_progress(step, max(warmup - 1, 0), total_steps)
        ratio: float = self.config.min_ratio
        share = (1.0 + math.cos(math.pi * progress)) / 2.0
        return share + ratio * (1.0 - share)
