"""Muon (arXiv 2502.16982) for hidden matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fasttrain_kernels.optim import Muon, OnePassOptimizer

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.optimizer import MuonConfig
from fasttrain.core.interfaces import ParameterGroup
from fasttrain.core.kernel_plan import KernelPlan, fits
from fasttrain.optimizer.named_groups import named_groups
from fasttrain.optimizer.one_pass import OnePassFactory
from fasttrain.runtime.precision import Precision

NEWTON_SCHULZ = "newton_schulz"


class MuonFactory(OnePassFactory):
    """Of a matrix: `momentum_buffer`; of what AdamW steps: `exp_avg` and `exp_avg_sq`."""

    Config = MuonConfig

    def kernel_facts(self, precision: Precision) -> Mapping[str, Mapping[str, Any]]:
        return {**super().kernel_facts(precision), NEWTON_SCHULZ: {"dtype": torch.float32}}

    def make(
        self, groups: list[dict[str, Any]], plan: KernelPlan, **options: Any
    ) -> OnePassOptimizer:
        return Muon(
            groups,
            momentum=self.config.momentum,
            nesterov=self.config.nesterov,
            adjust_lr=self.config.adjust_lr,
            ns_steps=self.config.ns_steps,
            betas=self.config.betas,
            eps=self.config.eps,
            newton_schulz_backend=plan.of_optimizer(NEWTON_SCHULZ),
            **options,
        )

    def groups(self, groups: list[ParameterGroup]) -> list[dict[str, Any]]:
        """Each group in two where only some of it are matrices, and named by who steps it.

        UserError where none is.
        """
        made = []
        for known, group in zip(groups, named_groups(groups), strict=True):
            is_hidden = known.role == "matrices"
            for whose, muon in (("Muon", True), ("AdamW", False)):
                params = [p for p in group["params"] if (is_hidden and is_matrix(p[1])) == muon]
                if params:
                    name = f"{group['name']} ({whose})"
                    rate = group["lr"] * (1.0 if muon else self._adamw_share(known))
                    made.append({**group, "name": name, "params": params, "lr": rate, "muon": muon})
        if not any(group["muon"] for group in made):
            raise UserError(
                Problem(
                    key="optimizer.type",
                    what="muon would step no parameter: none that is trained is a hidden matrix.",
                    hint="Take adamw.",
                )
            )
        return made

    def _adamw_share(self, group: ParameterGroup) -> float:
        """What a group's rate is multiplied by where AdamW steps it: a rule's own rate stands."""
        config = self.config
        is_given = any(
            rule.learning_rate is not None and fits(name, glob)
            for rule in config.rules
            for glob in rule.match
            for name in group.names
        )
        if is_given or config.adamw_learning_rate is None:
            return 1.0
        return float(config.adamw_learning_rate / config.learning_rate)

    def algorithm(self) -> str:
        return "adamw"


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether it has singular vectors to speak of: a row, or a filter per channel, has none."""
    return parameter.dim() in (2, 3) and min(parameter.shape[-2:]) > 1
