"""AdamW with moments of 8 or 4 bits, or fp8, by torchao, which only this file knows."""

from __future__ import annotations

import torch

from fasttrain.config.schema.optimizer import TorchaoAdamWConfig
from fasttrain.core.interfaces import OptimizerFactory, ParameterGroup
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.optimizer.named_groups import named_groups
from fasttrain.runtime.precision import Precision

_CLASSES = {8: "AdamW8bit", 4: "AdamW4bit", "fp8": "AdamWFp8"}


class TorchaoAdamWFactory(OptimizerFactory):
    """torchao.optim's AdamW8bit, AdamW4bit or AdamWFp8.

    State per parameter: `step` () fp32; `exp_avg` and `exp_avg_sq`, tensors of classes of torchao's
    own (plain ones for parameters of fewer than 4096 elements). Its step is compiled at the first
    use, once for each shape.
    """

    Config = TorchaoAdamWConfig

    def build(
        self, groups: list[ParameterGroup], *, plan: KernelPlan, precision: Precision
    ) -> torch.optim.Optimizer:
        from torchao import optim

        optimizer: torch.optim.Optimizer = getattr(optim, _CLASSES[self.config.bits])(
            named_groups(groups),
            betas=self.config.betas,
            eps=self.config.eps,
            bf16_stochastic_round=self.config.random_rounding,
        )
        return optimizer
