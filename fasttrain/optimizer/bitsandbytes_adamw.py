"""AdamW with moments of 8 bits (arXiv 2110.02861) by bitsandbytes, which only this file knows."""

from __future__ import annotations

import torch

from fasttrain.config.schema.optimizer import BitsandbytesAdamWConfig
from fasttrain.core.interfaces import OptimizerFactory, ParameterGroup
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.optimizer.named_groups import named_groups
from fasttrain.runtime.precision import Precision


class BitsandbytesAdamWFactory(OptimizerFactory):
    """bitsandbytes.optim.AdamW, with its state in pages that leave the GPU where that is asked for.

    State per parameter: `step`, a number; `state1` and `state2` in its shape, uint8 or fp32. Those
    of 8 bits have scales `absmax1` and `absmax2`, one for each block of 256, and tables `qmap1` and
    `qmap2` (256,). A parameter of fewer than 4096 elements has fp32.
    """

    Config = BitsandbytesAdamWConfig

    def build(
        self, groups: list[ParameterGroup], *, plan: KernelPlan, precision: Precision
    ) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW

        optimizer: torch.optim.Optimizer = AdamW(
            named_groups(groups),
            betas=self.config.betas,
            eps=self.config.eps,
            optim_bits=self.config.bits,
            is_paged=self.config.paged,
        )
        return optimizer
