"""One process, one device, plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.engine import LocalEngineConfig
from fasttrain.core.batch import Batch, LossFunction, LossSum, StepResult
from fasttrain.core.engine_interface import Engine, NamedSlice
from fasttrain.core.events import Hooks
from fasttrain.core.interfaces import ClippingOptimizer, LanguageModel, Topology
from fasttrain.engine.averaged_weights import averaged_weights, averages
from fasttrain.engine.gradient_sums import GradientSums
from fasttrain.engine.optimizer_numbers import OptimizerNumbers
from fasttrain.runtime.precision import Precision

T = TypeVar("T")


class LocalEngine(Engine):
    """Weights, gradients and optimizer state on one device; autocast where precision is mixed."""

    Config = LocalEngineConfig
    topology = Topology()

    def __init__(self, config: Any, *, precision: Precision, device: torch.device) -> None:
        super().__init__(config, precision=precision, device=device)
        self._model: LanguageModel | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._max_grad_norm = 0.0
        self._hooks = Hooks()
        self._numbers: OptimizerNumbers | None = None
        self._shows_average = False
        self._sums: GradientSums | None = None

    def model_init_context(self) -> AbstractContextManager[None]:
        return nullcontext()

    def attach(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float,
        hooks: Hooks,
    ) -> None:
        if self.precision.masters and not isinstance(optimizer, ClippingOptimizer):
            raise UserError(
                Problem(
                    key="precision",
                    what="weights are in bf16 with fp32 masters in the optimizer, and "
                    f"{type(optimizer).__name__} keeps none.",
                    hint="Where create_optimizer is wrapped, return an optimizer of "
                    "fasttrain_kernels.optim; or register one of your own as optimizer.type.",
                )
            )
        self._model = model
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._hooks = hooks
        self._numbers = OptimizerNumbers(model, optimizer)
        if isinstance(optimizer, ClippingOptimizer):
            optimizer.max_grad_norm = max_grad_norm or None
        self._sums = GradientSums(model) if self.precision.masters else None

    @property
    def model(self) -> LanguageModel:
        assert self._model is not None, "train_step before attach"
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        assert self._optimizer is not None, "train_step before attach"
        return self._optimizer

    # --- steps -----------------------------------------------------------------------------------

    def train_step(self, micro_batches: Iterable[Batch], loss: LossFunction) -> StepResult:
        micro_batches = tuple(micro_batches)
        num_supervised = sum(batch.num_supervised for batch in micro_batches)
        self.model.train()
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        extras: dict[str, Tensor] = {}
        if self._sums is not None:
            self._sums.begin(len(micro_batches))
        for batch in micro_batches:
            part = self._forward(batch.to(self.device), loss)
            # One division by the whole step's count, so that the split into micro-batches is free.
            self._hooks.call("backward", self._backward, part.sum / max(num_supervised, 1))
            loss_sum += part.sum.detach()
            for name, value in part.extras.items():
                extras[name] = extras.get(name, 0) + value.detach()
        grad_norm = self._clip()
        skipped = ~(torch.isfinite(grad_norm) & torch.isfinite(loss_sum))
        self._hooks.call("optimizer_step", self._optimizer_step, skipped)
        self.optimizer.zero_grad(set_to_none=True)
        if self._sums is not None:
            self._sums.end()
        return StepResult(
            loss_sum=loss_sum,
            num_supervised=num_supervised,
            num_tokens=sum(batch.num_tokens for batch in micro_batches),
            grad_norm=grad_norm,
            skipped=skipped,
            extras=extras,
        )

    def eval_forward(self, batch: Batch, loss: LossFunction) -> LossSum:
        self.model.eval()
        with torch.no_grad():
            return self._forward(batch.to(self.device), loss)

    def loss_and_gradients(
        self, batch: Batch, loss: LossFunction
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.model.train()
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with _buffers_kept(self.model):
            part = self._forward(batch.to(self.device), loss)
            mean = part.sum / max(part.count, 1)
            if not mean.requires_grad:  # see _backward
                return mean, {name: torch.zeros_like(p) for name, p in trained.items()}
            # An expert that met no token has zeros.
            gradients = torch.autograd.grad(mean, tuple(trained.values()), materialize_grads=True)
        return mean.detach(), dict(zip(trained, gradients, strict=True))

    def _forward(self, batch: Batch, loss: LossFunction) -> LossSum:
        with self._autocast():
            part = loss(batch)
        if part.count != batch.num_supervised:
            raise UserError(
                Problem(
                    key="type",
                    what=f"the loss counted {part.count} tokens where the batch has "
                    f"{batch.num_supervised} supervised ones.",
                    hint="LossSum.count must be batch.num_supervised: a step's loss is divided by "
                    "their number, which is known before the forward pass.",
                )
            )
        return part

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision.autocast)

    def _backward(self, loss: Tensor) -> None:
        # A micro-batch with nothing supervised may give a constant zero, which has no graph.
        if loss.requires_grad:
            loss.backward()

    def _clip(self) -> Tensor:
        """The norm of all gradients; they are clipped, or will be by the step."""
        if isinstance(self.optimizer, ClippingOptimizer):
            return self.optimizer.measure().to(self.device)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if not parameters:
            return torch.zeros((), device=self.device)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._max_grad_norm > 0:
            clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        return norm

    def _optimizer_step(self, skip: Tensor) -> None:
        """Step unless `skip`. torch's fused optimizers decide on the device; others need a sync."""
        if self.optimizer.defaults.get("fused"):
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = skip.to(torch.float32)  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.found_inf = None  # type: ignore[attr-defined]
        elif not skip.item():
            self.optimizer.step()

    # --- state -----------------------------------------------------------------------------------

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        return make()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        if self._shows_average or not averages(self.optimizer):
            yield
            return
        self._shows_average = True
        try:
            with averaged_weights(self.optimizer):
                yield
        finally:
            self._shows_average = False

    def optimizer_numbers(self) -> dict[str, Any]:
        assert self._numbers is not None, "optimizer_numbers before attach"
        return self._numbers.state_dict()

    def load_optimizer_numbers(self, saved: dict[str, Any]) -> None:
        assert self._numbers is not None, "load_optimizer_numbers before attach"
        self._numbers.load_state_dict(saved)

    def state_slices(self) -> Iterator[NamedSlice]:
        for name, tensor in self._trained_tensors().items():
            yield NamedSlice("model", name, tensor.detach(), tuple(tensor.shape))
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):  # others: optimizer_numbers
                    yield NamedSlice("optimizer", f"{name}/{key}", value, tuple(value.shape))

    def load_slices(self, slices: Iterable[NamedSlice]) -> None:
        by_kind: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for part in slices:
            assert part.tensor.shape == torch.Size(part.global_shape), f"{part.name} is a fragment"
            by_kind[part.kind][part.name] = part.tensor
        self._load_model(by_kind["model"])
        self._load_optimizer(by_kind["optimizer"])

    def _trained_tensors(self) -> dict[str, Tensor]:
        """Trainable parameters and persistent buffers; frozen weights come from `model:` again."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        persistent = self.model.state_dict()
        buffers = {n: b for n, b in self.model.named_buffers() if n in persistent}
        return {**trained, **buffers}

    def _load_model(self, saved: dict[str, Tensor]) -> None:
        present = self._trained_tensors()
        _require_same_names(set(saved), set(present), "model")
        with torch.no_grad():
            for name, tensor in present.items():
                if tensor.shape != saved[name].shape:
                    raise ValueError(
                        f"{name} is {tuple(tensor.shape)} in the model "
                        f"and {tuple(saved[name].shape)} in the checkpoint"
                    )
                tensor.copy_(saved[name])

    def _load_optimizer(self, saved: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        stepped = {p for group in self.optimizer.param_groups for p in group["params"]}
        expected = {name for name, parameter in parameters.items() if parameter in stepped}
        # A parameter may have none yet: SGD keeps nothing, an expert may not have met a token.
        _refuse_surplus({key.rpartition("/")[0] for key in saved}, expected, "optimizer")
        step_on_device = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get(
            "capturable"
        )
        for key, value in saved.items():
            name, _, state_name = key.rpartition("/")
            parameter = parameters[name]
            on_device = value.dim() > 0 or step_on_device
            state = self.optimizer.state[parameter]
            state[state_name] = value.clone().to(parameter.device if on_device else "cpu")


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers that a forward pass changes or replaces, such as running means, are put back."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                setattr(module, name, buffer.copy_(value))


def _require_same_names(saved: set[str], present: set[str], what: str) -> None:
    if missing := sorted(present - saved):
        raise ValueError(f"the checkpoint lacks {what} state of: {', '.join(missing)}")
    _refuse_surplus(saved, present, what)


def _refuse_surplus(saved: set[str], present: set[str], what: str) -> None:
    if surplus := sorted(saved - present):
        raise ValueError(f"the checkpoint has {what} state of unknown: {', '.join(surplus)}")
