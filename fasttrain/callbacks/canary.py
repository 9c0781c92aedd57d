"""Now and then a micro-batch is computed twice: with the kernels, and with their references."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import fasttrain_kernels
import torch
from torch import Tensor

from fasttrain.config.schema.callback import CanaryConfig
from fasttrain.core.batch import Batch, LossFunction
from fasttrain.core.engine_interface import Engine
from fasttrain.core.events import Callback, StepStart
from fasttrain.core.kernel_plan import EAGER, KernelPlan
from fasttrain.runtime.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from fasttrain.core.run import Run

# Kernels and references differ by roundings: float32 losses and gradients of whole models agree to
# 1e-6 and 1e-5, 16-bit ones to 1e-3 and 2e-2. A kernel that is wrong is off by far more.
BOUNDS = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.1}

log = logging.getLogger("fasttrain")

Served = Mapping[str, tuple[str, ...]]  # the backends that serve an op's sites


@dataclass(frozen=True)
class Difference:
    """Between two ways to compute a micro-batch, each relative to the second's size. Infinite where
    only the first is not finite."""

    loss: float
    gradient: float  # of the norm over all parameters

    @property
    def worst(self) -> float:
        return max(self.loss, self.gradient)

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, gradient {self.gradient:.1e}"


@dataclass(frozen=True)
class _Result:
    loss: float  # nats per supervised token
    gradients: dict[str, Tensor]


class Canary(Callback):
    """Before every `every_steps`-th step, the first included, a micro-batch of it runs forward and
    backward twice: on the kernels, and with `fasttrain_kernels.use(mode="eager")`.

    The relative differences of loss and gradient go to the next logged line. The run learns what it
    would without: nothing is kept of these passes, and the random state is put back. They take room
    for one more set of gradients, and for what the references hold.
    """

    Config = CanaryConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or CanaryConfig())
        self._served: Served = {}

    def on_train_start(self, run: Run, record: None) -> None:
        self._served = _served(run.kernels)
        if not self._served:
            log.info("canary: no kernel serves this model; there is nothing to compare")

    def on_step_start(self, run: Run, record: StepStart) -> None:
        if not self._served or (record.step - 1) % self.config.every_steps != 0:
            return
        # One without a supervised token has no loss that could differ.
        learnt = [batch for batch in record.batch.micro_batches if batch.num_supervised]
        if not learnt:
            return
        computed = partial(_computed, run.engine, learnt[0], record.loss)
        with run.paused():
            try:
                self._look(run, record.step, computed)
            except torch.OutOfMemoryError as error:
                self._served = {}
                log.warning(
                    "canary: step %d: a micro-batch with references does not fit into memory; "
                    "nothing is compared from here on (%s)",
                    record.step,
                    error,
                )

    def _look(self, run: Run, step: int, computed: Callable[..., _Result]) -> None:
        reference = computed(mode=EAGER)
        if not math.isfinite(reference.loss + _norm(reference.gradients.values())):
            log.warning("canary: step %d is not finite with the references either", step)
            return
        found = _difference(computed(), reference)
        self._note(run, found)
        bound = self.config.bound or BOUNDS[run.engine.precision.activations]
        if found.worst > bound:
            alone = {op: _alone(op, self._served, computed, reference) for op in self._served}
            self._act(run, step, found, bound, alone)

    def _note(self, run: Run, found: Difference) -> None:
        """For the next logged line; of several within an interval the worst."""
        metrics = run.interval.metrics
        for name, value in (("loss", found.loss), ("gradient", found.gradient)):
            key = f"canary_{name}_difference"
            metrics[key] = max(metrics.get(key, 0.0), value)

    def _act(
        self, run: Run, step: int, found: Difference, bound: float, alone: dict[str, Difference]
    ) -> None:
        culprits = [op for op, difference in alone.items() if difference.worst > bound]
        what = (
            f"step {step}: kernels and references differ by more than {bound:g} ({found}); "
            f"{_blame(culprits, alone, self._served)}"
        )
        log.warning("canary: %s", what)
        if self.config.policy == "stop":
            run.stop(f"{what} (canary, policy stop)", exit_code=1)
        elif self.config.policy == "quarantine":
            for op in culprits:
                for backend in self._served[op]:
                    fasttrain_kernels.quarantine(
                        op, backend, f"canary: {alone[op]}", device=run.engine.device
                    )


def _served(plan: KernelPlan) -> Served:
    """The ops that have a site on a kernel, each with its backends."""
    found: dict[str, set[str]] = defaultdict(set)
    for site in plan.sites:
        if site.backend != EAGER:
            found[site.op].add(site.backend)
    return {op: tuple(sorted(backends)) for op, backends in found.items()}


def _computed(engine: Engine, batch: Batch, loss: LossFunction, **asked: str) -> _Result:
    """The micro-batch with the kernels asked for. Each time with the same random numbers, and as if
    none had been drawn."""
    state = random_state()
    try:
        with fasttrain_kernels.use(**asked):  # type: ignore[arg-type]
            value, gradients = engine.loss_and_gradients(batch, loss)
    finally:
        set_random_state(state)
    return _Result(value.item(), gradients)


def _alone(
    op: str, served: Served, computed: Callable[..., _Result], reference: _Result
) -> Difference:
    """What the kernel of `op` does by itself: all others run their references. Two wrong ones are
    both found so, which leaving out one at a time would not show."""
    others = {other: EAGER for other in served if other != op}
    return _difference(computed(**others), reference)


def _blame(culprits: list[str], alone: dict[str, Difference], served: Served) -> str:
    named = [f"{op} ({', '.join(served[op])})" for op in culprits]
    if named:
        return f"the culprit is {named[0]}" if len(named) == 1 else f"culprits: {', '.join(named)}"
    largest = max(alone, key=lambda op: alone[op].worst)
    return f"no op is to blame alone, most comes from {largest} ({alone[largest]})"


def _difference(found: _Result, reference: _Result) -> Difference:
    apart = (found.gradients[name] - theirs for name, theirs in reference.gradients.items())
    return Difference(
        loss=_relative(abs(found.loss - reference.loss), abs(reference.loss)),
        gradient=_relative(_norm(apart), _norm(reference.gradients.values())),
    )


def _relative(apart: float, size: float) -> float:
    if apart == 0:
        return 0.0
    return apart / size if math.isfinite(apart) and size > 0 else math.inf


def _norm(tensors: Iterable[Tensor]) -> float:
    """Over all of them; one wait for the device."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.stack(norms).double().norm().item()
