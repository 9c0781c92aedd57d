"""Lion (arXiv 2302.06675)."""

from __future__ import annotations

from typing import Any

from fasttrain_kernels.optim import Lion, OnePassOptimizer

from fasttrain.config.schema.optimizer import LionConfig
from fasttrain.optimizer.one_pass import OnePassFactory


class LionFactory(OnePassFactory):
    """One moment: `exp_avg`."""

    Config = LionConfig

    def make(self, groups: list[dict[str, Any]], **options: Any) -> OnePassOptimizer:
        return Lion(groups, betas=self.config.betas, **options)
