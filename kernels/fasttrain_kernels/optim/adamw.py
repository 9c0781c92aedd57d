"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttrain_kernels.ops.optimizer_step.step import Numbers
from fasttrain_kernels.optim.one_pass import OnePassOptimizer, check_betas, sign_of
from fasttrain_kernels.optim.slots import Names


class AdamW(OnePassOptimizer):
    """torch.optim.AdamW's step, and in the same pass what it leaves to others: OnePassOptimizer.

    lr: learning rate, a float or a () tensor. betas: decay rates of both moments. eps: added to the
    root of the second. weight_decay: decoupled, times lr. State: `exp_avg`, `exp_avg_sq`; with 8
    bits the codes of `exp_avg_sq` are of its root. Raises ValueError for options out of range.
    """

    algorithm = "adamw"
    names = Names("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: str = "master",
        moments: str = "float32",
        maximize: bool = False,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "moments": moments,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_betas(group)
        if not group["eps"] >= 0:
            raise ValueError(f"eps={group['eps']}; expected 0 or more")

    def numbers(self, group: dict[str, Any]) -> Numbers:
        beta1, beta2 = group["betas"]
        sign = sign_of(group)
        return Numbers(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], sign=sign)
