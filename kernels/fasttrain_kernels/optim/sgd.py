"""Stochastic gradient descent with momentum, as torch.optim.SGD has it, in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttrain_kernels.ops.optimizer_step.step import Numbers
from fasttrain_kernels.optim.one_pass import OnePassOptimizer, check_share, sign_of
from fasttrain_kernels.optim.slots import Names


class SGD(OnePassOptimizer):
    """torch.optim.SGD's step, and in the same pass what it leaves to others: OnePassOptimizer.

    lr: learning rate, a float or a () tensor. weight_decay: added to the gradient. State:
    `momentum_buffer`, none without momentum. Raises ValueError for options out of range.
    """

    algorithm = "sgd"
    names = Names("momentum_buffer")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        rounding: str = "master",
        moments: str = "float32",
        maximize: bool = False,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "rounding": rounding,
            "moments": moments,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_share(group, "momentum", [group["momentum"]])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError("nesterov=True needs momentum above 0, and dampening=0")

    def keeps_moments(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"])

    def numbers(self, group: dict[str, Any]) -> Numbers:
        return Numbers(
            group["lr"],
            group["momentum"],
            group["dampening"],
            0.0,
            group["weight_decay"],
            nesterov=float(group["nesterov"]),
            sign=sign_of(group),
        )
