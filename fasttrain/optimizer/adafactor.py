"""Adafactor (arXiv 1804.04235) by torch."""

from __future__ import annotations

import torch

from fasttrain.config.schema.optimizer import AdafactorConfig
from fasttrain.core.interfaces import OptimizerFactory, ParameterGroup
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.optimizer.named_groups import named_groups
from fasttrain.runtime.precision import Precision


class AdafactorFactory(OptimizerFactory):
    """torch.optim.Adafactor.

    State per parameter: `step` () fp32; of a matrix (…, M, N) `row_var` (…, M, 1) and `col_var`
    (…, 1, N), of a vector `variance` in its shape, all in the parameter's dtype.
    """

    Config = AdafactorConfig

    def build(
        self, groups: list[ParameterGroup], *, plan: KernelPlan, precision: Precision
    ) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(
            named_groups(groups),
            beta2_decay=self.config.beta2_decay,
            eps=(None, self.config.min_scale),
            d=self.config.clip_threshold,
        )
