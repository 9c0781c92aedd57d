"""What the factories of fasttrain's own optimizers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from fasttrain_kernels.optim import GradientRelease, OnePassOptimizer

from fasttrain.core.interfaces import OptimizerFactory, ParameterGroup
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.optimizer.named_groups import named_groups
from fasttrain.runtime.precision import Precision

STEP, NORM = "optimizer_step", "grad_norm"


class OnePassFactory(OptimizerFactory):
    """An optimizer of fasttrain_kernels.optim. The engine says by how much it clips.

    State per parameter: `step` () fp32; its moments, in its shape and in fp32, bf16 or, with a
    `<moment>_scale` for 256 elements, uint8; `master` fp32 or `compensation` bf16 of a bf16 one.
    """

    keeps_masters = True

    def kernel_facts(self, precision: Precision) -> Mapping[str, Mapping[str, Any]]:
        dtype = precision.parameters
        facts = {"dtype": dtype, "algorithm": self.config.type, "moments": self._moments()}
        if dtype == torch.bfloat16:
            facts["rounding"] = self.rounding(precision)
        return {STEP: facts, NORM: {"dtype": dtype}}

    def build(
        self, groups: list[ParameterGroup], *, plan: KernelPlan, precision: Precision
    ) -> torch.optim.Optimizer:
        optimizer = self.make(
            named_groups(groups),
            rounding=self.rounding(precision),
            moments=self.config.moments,
            backend=plan.of_optimizer(STEP),
            norm_backend=plan.of_optimizer(NORM),
        )
        if self.config.gradient_release:
            GradientRelease(optimizer)
        return optimizer

    @abstractmethod
    def make(self, groups: list[dict[str, Any]], **options: Any) -> OnePassOptimizer:
        """The optimizer of these groups, with `options` passed on."""

    def rounding(self, precision: Precision) -> str:
        """How 16-bit parameters are kept."""
        return "master" if precision.masters else str(self.config.rounding)

    def _moments(self) -> str:
        return str(self.config.moments)
