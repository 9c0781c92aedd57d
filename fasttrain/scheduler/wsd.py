"""Warm-up, stable, decay (arXiv 2404.06395)."""

from __future__ import annotations

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.scheduler import WsdConfig
from fasttrain.core.interfaces import SchedulerFactory
from fasttrain.scheduler.warmup import decay_progress, warmup_factor, warmup_steps


class WsdFactory(SchedulerFactory):
    """1 after the warm-up, then over the last `decay_ratio` of all steps a straight line down,
    which would be at min_ratio just after the last step."""

    Config = WsdConfig

    def factor(self, step: int, total_steps: int) -> float:
        warmup = warmup_steps(self.config, total_steps)
        decay = self._decay_steps(warmup, total_steps)
        if step < warmup:
            return warmup_factor(step, warmup)
        # Even where all of the run decays, its first step is at the peak.
        peak = max(total_steps - 1 - decay, warmup - 1, 0)
        progress = decay_progress(step, peak, total_steps)
        ratio: float = self.config.min_ratio
        return (1.0 - progress) + ratio * progress

    def _decay_steps(self, warmup: int, total_steps: int) -> int:
        decay = round(self.config.decay_ratio * total_steps)
        if warmup + decay > total_steps:
            raise UserError(
                Problem(
                    key="scheduler.decay_ratio",
                    what=f"{warmup} steps of warm-up and {decay} of decay don't fit into a run of "
                    f"{total_steps} steps.",
                    hint="Shorten one of them or train longer.",
                )
            )
        return decay
