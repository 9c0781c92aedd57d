"""Steps within the backward pass: a gradient lives until its parameter is stepped, and no longer.

Memory for all gradients is saved (LOMO, Lv et al., arXiv 2306.09782, does so for SGD). Clipping by
the norm of all gradients, and adding up over several backward passes, need them all at once.
"""

from __future__ import annotations

from torch import Tensor

from fasttrain_kernels.ops.grad_norm.op import grad_norm
from fasttrain_kernels.optim.one_pass import OnePassOptimizer


class GradientRelease:
    """From now on each backward pass steps `optimizer`'s parameters, and drops their gradients.

    A parameter whose gradient is not finite is left as it is, by itself. `optimizer.step()` finds
    nothing to do. remove() ends it. ValueError where the optimizer clips.
    """

    def __init__(self, optimizer: OnePassOptimizer) -> None:
        if optimizer.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={optimizer.max_grad_norm} needs all gradients at once, which are "
                "dropped one by one; build the optimizer without it"
            )
        self._norms: list[Tensor] = []
        self._optimizer = optimizer
        optimizer.release = self
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._step)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def norm(self) -> Tensor:
        """The norm of all gradients since it was last asked for, () float32."""
        norm = grad_norm(self._norms)
        self._norms = []
        return norm

    def remove(self) -> None:
        """Leave gradients to `optimizer.step()` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizer.release = None

    def _step(self, parameter: Tensor) -> None:
        if len(self._norms) >= len(self._handles):  # nobody asks: keep one number, not all of them
            self._norms = [grad_norm(self._norms)]
        self._norms.append(self._optimizer.step_alone(parameter))
        parameter.grad = None
