"""Lion (Chen et al., arXiv 2302.06675) in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttrain_kernels.ops.optimizer_step.step import Numbers
from fasttrain_kernels.optim.one_pass import OnePassOptimizer, check_betas, sign_of
from fasttrain_kernels.optim.slots import Names


class Lion(OnePassOptimizer):
    """Steps of one size in the direction of a mean of gradients: one moment instead of two.

    lr: learning rate, a float or a () tensor; a third to a tenth of AdamW's is usual, with a weight
    decay as many times larger. betas: how much the moment counts in the direction, and its decay
    rate. Other options: OnePassOptimizer. State: `exp_avg`. Raises ValueError for options out of
    range.
    """

    algorithm = "lion"
    names = Names("exp_avg")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        rounding: str = "master",
        moments: str = "float32",
        maximize: bool = False,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "moments": moments,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_betas(group)

    def numbers(self, group: dict[str, Any]) -> Numbers:
        sign = sign_of(group)
        beta1, beta2 = group["betas"]
        return Numbers(group["lr"], beta1, beta2, 0.0, group["weight_decay"], sign=sign)
