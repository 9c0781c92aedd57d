"""Schedule-free AdamW (arXiv 2405.15682) by schedulefree, which only this file knows."""

from __future__ import annotations

from typing import Any

import torch

from fasttrain.config.schema.optimizer import ScheduleFreeAdamWConfig
from fasttrain.core.interfaces import OptimizerFactory, ParameterGroup
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.optimizer.named_groups import named_groups
from fasttrain.runtime.precision import Precision


class ScheduleFreeAdamWFactory(OptimizerFactory):
    """schedulefree.AdamWScheduleFree, in its training mode.

    State per parameter: `z` and `exp_avg_sq` in its shape and dtype. Numbers per group, which steps
    change: `k`, `weight_sum`, `lr_max`, `scheduled_lr`. Its `eval()` puts the averaged weights into
    the parameters.
    """

    Config = ScheduleFreeAdamWConfig

    def build(
        self, groups: list[ParameterGroup], *, plan: KernelPlan, precision: Precision
    ) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        optimizer: Any = AdamWScheduleFree(
            named_groups(groups), betas=self.config.betas, eps=self.config.eps
        )
        optimizer.train()
        return optimizer
