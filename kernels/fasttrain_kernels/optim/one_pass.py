"""What AdamW, Lion and SGD share: everything but their numbers and the names of their moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fasttrain_kernels.ops.grad_norm.op import Tables, grad_norm
from fasttrain_kernels.ops.optimizer_step.op import optimizer_step
from fasttrain_kernels.ops.optimizer_step.step import Algorithm, Numbers, Step
from fasttrain_kernels.ops.optimizer_step.table import Table
from fasttrain_kernels.optim.group_numbers import GroupNumbers
from fasttrain_kernels.optim.slots import Names, Slices, gradient_of, slots_of
from fasttrain_kernels.settings import AUTO

if TYPE_CHECKING:
    from fasttrain_kernels.optim.gradient_release import GradientRelease

ROUNDINGS = ("master", "stochastic", "kahan")
MOMENTS = ("float32", "bfloat16", "8bit")


class OnePassOptimizer(torch.optim.Optimizer):
    """A torch optimizer that steps all of its tensors by one kernel.

    rounding: how parameters of 16 bits are kept: "master" (a float32 copy in the state, 4 bytes
    more), "stochastic" (rounded at random, no copy), "kahan" (what rounding lost is in the state, 2
    bytes more). Others are stepped as they are. moments: "float32", "bfloat16" (rounded at random)
    or "8bit" (with a scale for 256 elements). Both may differ from group to group.

    max_grad_norm: gradients are clipped to this norm over all groups within the step; None leaves
    them. A step whose norm was measured, for clipping or by `measure()`, and is not finite changes
    nothing. zero_grad_in_step: the step sets gradients to zero too, for who keeps them, as under a
    CUDA graph; `zero_grad()` costs nothing otherwise. seed: of random rounding, the same on every
    rank. backend, norm_backend: of the ops optimizer_step and grad_norm.

    After a step `grad_norm` is the norm of the gradients, () float32, before clipping; None where
    it was not measured. torch.amp.GradScaler works: its scale and its flag go into the step. A
    parameter's `main_grad`, where it has one, is taken rather than `.grad`. Learning rates may be
    tensors, and steps be captured in CUDA graphs.

    State of a parameter: `step` () float32; moments in its shape, with 8 bits uint8 codes and
    `<name>_scale` (blocks,) float32; `master` or `compensation` in its shape.
    """

    algorithm: ClassVar[Algorithm]
    names: ClassVar[Names]
    # What holds for all groups: copies and files of an optimizer keep it, beside what torch keeps.
    options: ClassVar[tuple[str, ...]] = (
        "max_grad_norm",
        "zero_grad_in_step",
        "seed",
        "backend",
        "norm_backend",
        "_slices",
    )

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None = None,
        zero_grad_in_step: bool = False,
        seed: int = 0,
        backend: str = AUTO,
        norm_backend: str = AUTO,
    ) -> None:
        self._slices: Slices = {}
        self._begin()
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}; expected more than 0, or None")
        self.max_grad_norm = max_grad_norm
        self.zero_grad_in_step = zero_grad_in_step
        self.seed = seed
        self.backend = backend
        self.norm_backend = norm_backend
        # torch's way to say that nothing of a step happens on the host.
        super().__init__(params, {**defaults, "capturable": True, "fused": True})

    def _begin(self) -> None:
        """What neither copies nor files of an optimizer have."""
        self._tables: dict[Any, Table] = {}
        self._norm_tables = Tables()
        self._numbers = GroupNumbers()
        self._measured: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self.release: GradientRelease | None = None

    # --- for subclasses --------------------------------------------------------------------------

    def numbers(self, group: dict[str, Any]) -> Numbers:
        """What the kernel is told of a group; the learning rate may be a tensor."""
        raise NotImplementedError

    def check(self, group: dict[str, Any]) -> None:
        """ValueError where an option of a group is out of its range."""
        _check_word(group, "rounding", ROUNDINGS)
        _check_word(group, "moments", MOMENTS)
        for name in ("lr", "weight_decay"):
            if not isinstance(group[name], Tensor) and not group[name] >= 0:
                raise ValueError(f"{name}={group[name]}; expected 0 or more")

    def keeps_moments(self, group: dict[str, Any]) -> bool:
        """Whether a step of a group needs what the steps before have left."""
        return True

    # --- the step --------------------------------------------------------------------------------

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` computes loss and gradients anew, and its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.max_grad_norm is not None and self._measured is None:
            self.measure()
        self.grad_norm, self._measured = self._measured, None
        self._step(self._parameters(), self.grad_norm)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; and a norm that was measured, but not stepped by, is forgotten."""
        super().zero_grad(set_to_none)
        self._measured = None

    def measure(self) -> Tensor:
        """The norm of all gradients as they lie there, () float32. The next step goes by it.

        With GradientRelease it is of those that the backward pass has stepped and dropped.
        """
        if self.release is not None:
            return self.release.norm()
        gradients = [grad for p in self._parameters() if (grad := gradient_of(p)) is not None]
        self._measured = grad_norm(gradients, tables=self._norm_tables, backend=self.norm_backend)
        return self._measured

    @torch.compiler.disable
    def step_alone(self, parameter: Tensor) -> Tensor:
        """Step one parameter that has a gradient, unless that is not finite; its norm ()."""
        gradient = gradient_of(parameter)
        assert gradient is not None, "step_alone of a parameter without a gradient"
        norm = grad_norm([gradient], backend=self.norm_backend)
        self._step([parameter], norm)
        return norm

    @torch.no_grad()
    def _step(self, parameters: Sequence[Tensor], norm: Tensor | None) -> None:
        batch = slots_of(self, self.names, self._slices, parameters)
        numbers = [self.numbers(group) for group in self.param_groups]
        for kind, slots in batch.by_kind.items():
            device = kind.device
            work = Step(
                self.algorithm,
                kind.rounding,
                kind.moments,
                slots,
                self._numbers.on(device, numbers),
                # Who steps parameters one by one has a table for each.
                self._tables.setdefault((kind, slots[0].stream, len(slots)), Table()),
                norm=scalar_on(norm, device),
                max_norm=self.max_grad_norm or 0.0,
                grad_scale=scalar_on(getattr(self, "grad_scale", None), device),
                skip=scalar_on(self.found_inf, device),
                seed=self.seed,
                zero_grad=self.zero_grad_in_step,
            )
            optimizer_step(work, backend=self.backend)
        batch.write_back()
        # Kernels write past autograd, which must know that what it saved has changed.
        torch.autograd.graph.increment_version(batch.parameters)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    # --- parameters and state --------------------------------------------------------------------

    def declare_slice(self, parameter: Tensor, *, tensor: int, offset: int) -> None:
        """Say that `parameter` is a slice of a larger, flat tensor, from element `offset` on.

        tensor: a number for the whole one, the same for all of its slices wherever they are. With
        it, what is rounded at random doesn't depend on how a tensor is cut; nor do moments of 8
        bits, where slices begin at multiples of 256. By default a parameter is whole, and its
        number its place among the optimizer's.
        """
        if offset < 0:
            raise ValueError(f"offset={offset}; expected 0 or more")
        self._slices[parameter] = (tensor, offset)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self.check(group)
        for parameter in group["params"]:
            _check_parameter(parameter, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round masters and moments to the parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(saved, self._parameters(), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = _as_saved(value, parameter.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_tables"):  # a copy; load_state_dict() comes here too
            self._begin()
        for group in self.param_groups:  # what torch's optimizers save lacks our options
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _as_saved(value: Any, device: torch.device) -> Any:
    return value.detach().clone().to(device) if isinstance(value, Tensor) else value


def sign_of(group: dict[str, Any]) -> float:
    """What a group's gradients are multiplied by."""
    return -1.0 if group["maximize"] else 1.0


def scalar_on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """As a kernel reads it."""
    return None if tensor is None else tensor.to(device, torch.float32)


def _check_word(group: dict[str, Any], name: str, allowed: Iterable[str]) -> None:
    if group[name] not in allowed:
        raise ValueError(f"{name}={group[name]!r}; expected one of {', '.join(allowed)}")


def check_share(group: dict[str, Any], name: str, values: Iterable[float]) -> None:
    """ValueError unless each value of option `name` is in [0, 1)."""
    if not all(0 <= value < 1 for value in values):
        raise ValueError(f"{name}={group[name]}; expected 0 or more, and less than 1")


def check_betas(group: dict[str, Any]) -> None:
    """ValueError unless `betas` are two numbers in [0, 1)."""
    if len(group["betas"]) != 2:
        raise ValueError(f"betas={group['betas']}; expected two numbers")
    check_share(group, "betas", group["betas"])


def _check_parameter(parameter: Tensor, group: dict[str, Any]) -> None:
    what = f"a parameter of shape {tuple(parameter.shape)}"
    if parameter.dtype == torch.float16 and group["rounding"] == "stochastic":
        raise ValueError(f"{what} is float16; rounding='stochastic' is for bfloat16")
    if parameter.dtype == torch.float64 and group["moments"] == "8bit":
        raise ValueError(f"{what} is float64; moments='8bit' are of float32")
    if not parameter.is_floating_point():
        raise ValueError(f"{what} is {parameter.dtype}, which has no step")
    if type(parameter.data) is not Tensor:
        raise ValueError(
            f"{what} holds a {type(parameter.data).__name__}; give the optimizer the local "
            "tensors, and say by declare_slice() what they are part of"
        )
