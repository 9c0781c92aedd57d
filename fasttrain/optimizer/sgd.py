"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Any

from fasttrain_kernels.optim import SGD, OnePassOptimizer

from fasttrain.config.schema.optimizer import SGDConfig
from fasttrain.optimizer.one_pass import OnePassFactory


class SGDFactory(OnePassFactory):
    """One moment: `momentum_buffer`; none without momentum."""

    Config = SGDConfig

    def make(self, groups: list[dict[str, Any]], **options: Any) -> OnePassOptimizer:
        momentum, nesterov = self.config.momentum, self.config.nesterov
        return SGD(groups, momentum=momentum, nesterov=nesterov, **options)

    def _moments(self) -> str:
        return super()._moments() if self.config.momentum > 0 else "none"
