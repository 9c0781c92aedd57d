"""Now and then a micro-batch is computed twice: with the kernels, and with their references."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fasttrain_kernels
import torch
from torch import Tensor, nn

from fasttrain.config.schema.callback import CanaryConfig
from fasttrain.core.batch import Batch, LossSum
from fasttrain.core.events import Callback
from fasttrain.core.interfaces import LanguageModel
from fasttrain.core.kernel_plan import EAGER
from fasttrain.runtime.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from fasttrain.core.run import Run

# Kernels and references differ by roundings: float32 losses and gradients of whole models agree to
# 1e-6 and 1e-5, 16-bit ones to 1e-3 and 2e-2. A kernel that is wrong is off by far more.
BOUNDS = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.1}

log = logging.getLogger("fasttrain")


@dataclass(frozen=True)
class Difference:
    """Between two ways to compute a micro-batch, each relative to the second's size."""

    loss: float
    gradient: float  # of the norm over all parameters

    @property
    def worst(self) -> float:
        return max(self.loss, self.gradient)

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, gradient {self.gradient:.1e}"


@dataclass(frozen=True)
class _Result:
    loss: Tensor  # ()
    gradients: tuple[Tensor | None, ...]


class Canary(Callback):
    """Every `every_steps` steps, and in the first, the step's first micro-batch runs forward and
    backward twice more: on the kernels, and with `fasttrain_kernels.use(mode="eager")`.

    The relative differences of loss and gradient go to the next logged line. The run learns what it
    would without: nothing is kept of these passes, and the random state is put back.
    """

    Config = CanaryConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or CanaryConfig())
        self._looked: int | None = None  # the last step that was looked at

    def wrap_loss(
        self, run: Run, call: Callable[..., LossSum], model: LanguageModel, batch: Batch
    ) -> LossSum:
        if self._is_due(run, model):
            self._looked = run.step
            started = time.perf_counter()
            self._look(run, model, lambda: call(model, batch))
            # What the canary takes is no part of the training's time.
            run.interval.seconds -= time.perf_counter() - started
        return call(model, batch)

    def _is_due(self, run: Run, model: nn.Module) -> bool:
        training = model.training and torch.is_grad_enabled()
        return training and run.step % self.config.every_steps == 0 and run.step != self._looked

    def _look(self, run: Run, model: nn.Module, loss: Callable[[], LossSum]) -> None:
        served = {site.op: site.backend for site in run.kernels.sites if site.backend != EAGER}
        if not served:
            if run.steps_this_process == 0:
                log.info("canary: no kernel serves this model; there is nothing to compare")
            return
        state = random_state()

        def result(**asked: str) -> _Result:
            set_random_state(state)
            with fasttrain_kernels.use(**asked):  # type: ignore[arg-type]
                return _computed(model, loss)

        reference = result(mode=EAGER)
        if not _is_finite(reference):
            log.warning("canary: step %d is not finite with the references either", run.step + 1)
        else:
            found = _difference(result(), reference)
            self._note(run, found)
            bound = self.config.bound or BOUNDS[run.engine.precision.activations]
            if not found.worst <= bound:
                remaining = {op: _difference(result(**{op: EAGER}), reference) for op in served}
                self._act(run, found, bound, _culprit(remaining, bound), served)
        set_random_state(state)

    def _note(self, run: Run, found: Difference) -> None:
        """For the next logged line; of several within an interval the worst."""
        metrics = run.interval.metrics
        for name, value in (("loss", found.loss), ("gradient", found.gradient)):
            key = f"canary_{name}_difference"
            metrics[key] = max(metrics.get(key, 0.0), value)

    def _act(
        self,
        run: Run,
        found: Difference,
        bound: float,
        culprit: str | None,
        served: dict[str, str],
    ) -> None:
        by = f"the culprit is {culprit}" if culprit else "no single op is to blame"
        what = (
            f"step {run.step + 1}: kernels and references differ by more than {bound:g} ({found}); "
            f"{by}"
        )
        log.warning("canary: %s", what)
        if self.config.policy == "stop":
            run.stop(f"{what} (canary, policy stop)", exit_code=1)
        elif self.config.policy == "quarantine":
            for op in [culprit] if culprit else served:
                backends = {s.backend for s in run.kernels.sites if s.op == op} - {EAGER}
                for backend in sorted(backends):
                    fasttrain_kernels.quarantine(
                        op, backend, f"canary: {found}", device=run.engine.device
                    )


def _computed(model: nn.Module, loss: Callable[[], LossSum]) -> _Result:
    """Loss per supervised token and gradients of what is trained; `.grad` stays as it is."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    part = loss()
    mean = part.sum / max(part.count, 1)
    gradients: tuple[Tensor | None, ...] = ()
    if mean.requires_grad:
        gradients = torch.autograd.grad(mean, trained, allow_unused=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    torch.clear_autocast_cache()  # it holds weights whose graph has been used up
    return _Result(mean.detach(), gradients)


def _difference(found: _Result, reference: _Result) -> Difference:
    """Infinite where `found` is not finite."""
    loss = abs(found.loss.item() - reference.loss.item()) / max(abs(reference.loss.item()), 1e-30)
    apart, size = 0.0, 0.0
    for mine, theirs in zip(found.gradients, reference.gradients, strict=True):
        if theirs is not None and mine is not None:
            apart += (mine.double() - theirs.double()).square().sum().item()
            size += theirs.double().square().sum().item()
    gradient = math.sqrt(apart) / max(math.sqrt(size), 1e-30)
    finite = math.isfinite(loss), math.isfinite(gradient)
    return Difference(loss if finite[0] else math.inf, gradient if finite[1] else math.inf)


def _is_finite(result: _Result) -> bool:
    tensors = [result.loss, *(g for g in result.gradients if g is not None)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _culprit(remaining: dict[str, Difference], bound: float) -> str | None:
    """The op without whose kernel the rest agrees; None where there is no such one."""
    op = min(remaining, key=lambda op: remaining[op].worst)
    return op if remaining[op].worst <= bound else None
