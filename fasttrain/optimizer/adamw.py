"""AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from typing import Any

from fasttrain_kernels.optim import AdamW, OnePassOptimizer

from fasttrain.config.schema.optimizer import AdamWConfig
from fasttrain.optimizer.one_pass import OnePassFactory


class AdamWFactory(OnePassFactory):
    """Moments: `exp_avg` and `exp_avg_sq`."""

    Config = AdamWConfig

    def make(self, groups: list[dict[str, Any]], **options: Any) -> OnePassOptimizer:
        return AdamW(groups, betas=self.config.betas, eps=self.config.eps, **options)
