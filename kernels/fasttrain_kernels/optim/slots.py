"""From parameters with gradients to what a kernel steps: state that is made when first needed, and
tensors whose elements lie one after the other.

A parameter whose elements fill its memory in another order than its shape's, such as channels last,
is stepped in that order, as are its state and its gradient, which are given the same order. Of one
with gaps a copy is stepped and written back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.ops.optimizer_step.step import Moments, Rounding, Slot
from fasttrain_kernels.ops.optimizer_step.table import BLOCK

if TYPE_CHECKING:
    from fasttrain_kernels.optim.one_pass import OnePassOptimizer

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
# Of parameters that are slices: the number of the whole tensor, and where the slice begins in it.
Slices = dict[Tensor, tuple[int, int]]


class Names(NamedTuple):
    """What an optimizer calls its moments in the state."""

    first: str
    second: str | None = None


class Kind(NamedTuple):
    """What tensors have in common that one launch steps."""

    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    rounding: Rounding
    moments: Moments


@dataclass
class Batch:
    """The slots of a step, and what is to be done after it."""

    by_kind: dict[Kind, list[Slot]] = field(default_factory=dict)
    parameters: list[Tensor] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of what has gaps

    def write_back(self) -> None:
        for original, copy in self.copies:
            original.copy_(copy)


def gradient_of(parameter: Tensor) -> Tensor | None:
    """`main_grad`, where gradients are added up in float32, else `.grad`."""
    gradient = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if gradient is None else gradient
    if gradient is not None and gradient.layout != torch.strided:
        raise ValueError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} is "
            f"{gradient.layout}; expected a dense one (of an embedding: sparse=False)"
        )
    return gradient


def slots_of(
    optimizer: OnePassOptimizer, names: Names, slices: Slices, parameters: Iterable[Tensor]
) -> Batch:
    """The slots of those parameters that have a gradient."""
    batch = Batch()
    wanted = set(parameters)
    stream = 0
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter in wanted and (gradient := gradient_of(parameter)) is not None:
                place = slices.get(parameter, (stream, 0))
                keeps = optimizer.keeps_moments(group)
                add_slot(batch, optimizer, names, parameter, gradient, group, index, place, keeps)
            stream += 1
    return batch


def add_slot(
    batch: Batch,
    optimizer: OnePassOptimizer,
    names: Names,
    parameter: Tensor,
    gradient: Tensor,
    group: dict[str, Any],
    index: int,
    place: tuple[int, int],
    has_moments: bool,
) -> None:
    """A slot of `parameter` to `batch`; index: of its numbers, place: as Slices has them."""
    kind = kind_of(parameter, gradient, group, has_moments)
    state = optimizer.state[parameter]
    make_state(state, names, parameter, kind, offset=place[1])
    param = parameter.detach()
    if param.stride() != dense_like(param).stride():
        param = torch.empty_like(param).copy_(param)
        batch.copies.append((parameter, param))
    grad = gradient.detach()
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=gradient.dtype).copy_(grad)
        if optimizer.zero_grad_in_step:
            batch.copies.append((gradient, grad))
    batch.parameters.append(parameter)
    batch.by_kind.setdefault(kind, []).append(
        Slot(
            flat(param),
            flat(grad),
            state["step"],
            _flat(state, names.first),
            _flat(state, names.second),
            state.get(f"{names.first}_scale"),
            state.get(f"{names.second}_scale"),
            _flat(state, "master" if kind.rounding == "master" else "compensation"),
            stream=place[0],
            offset=place[1],
            group=index,
        )
    )


def kind_of(parameter: Tensor, gradient: Tensor, group: dict[str, Any], has_moments: bool) -> Kind:
    """How a parameter is stepped."""
    narrow = parameter.dtype in (torch.bfloat16, torch.float16)
    return Kind(
        parameter.device,
        parameter.dtype,
        gradient.dtype,
        group["rounding"] if narrow else "none",
        group["moments"] if has_moments else "none",
    )


def make_state(
    state: dict[str, Any], names: Names, parameter: Tensor, kind: Kind, *, offset: int
) -> None:
    """Add what is missing: all of it at the first step, or after another optimizer's was loaded.

    What is there in another floating dtype, or laid out as the parameter was before, is put as the
    kernel reads it, which knows addresses only. ValueError where that can't be done.
    """
    if not isinstance(state.get("step"), Tensor):  # torch's was a number once
        count = float(state.get("step", 0))
        state["step"] = torch.tensor(count, dtype=torch.float32, device=parameter.device)
    like = dense_like(parameter)
    if kind.rounding == "master":
        master = state["master"] if "master" in state else parameter.detach()
        state["master"] = _as_read(master, "master", torch.float32, like)
    if kind.rounding == "kahan":
        _make_zeros(state, "compensation", parameter, parameter.dtype, like)
    if kind.moments == "none":
        return
    dtype = STATE_DTYPES[kind.moments]
    if parameter.dtype == torch.float64 and kind.moments == "float32":
        dtype = torch.float64
    for name in filter(None, names):
        _make_zeros(state, name, parameter, dtype, like)
        if kind.moments == "8bit":
            blocks = -(-(offset % BLOCK + parameter.numel()) // BLOCK)
            scale = f"{name}_scale"
            if scale not in state:
                state[scale] = torch.zeros(blocks, device=parameter.device)
            if len(state[scale]) != blocks:
                raise ValueError(
                    f"{scale} of a parameter of shape {tuple(parameter.shape)} is for "
                    f"{len(state[scale])} blocks; expected {blocks}, as its slice "
                    f"begins at {offset}"
                )


def _make_zeros(
    state: dict[str, Any], name: str, parameter: Tensor, dtype: torch.dtype, like: Tensor
) -> None:
    if state.get(name) is None:
        state[name] = torch.zeros_like(parameter, dtype=dtype)
    else:
        state[name] = _as_read(state[name], name, dtype, like)


def _as_read(value: Tensor, name: str, dtype: torch.dtype, like: Tensor) -> Tensor:
    """`value` in a dtype, with the shape and the strides of `like`."""
    if value.dtype == dtype and value.stride() == like.stride() and value.shape == like.shape:
        return value
    coded = torch.uint8 in (value.dtype, dtype) and value.dtype != dtype
    if coded or value.shape != like.shape:
        raise ValueError(
            f"{name} of a parameter of shape {tuple(like.shape)} is {value.dtype} of shape "
            f"{tuple(value.shape)}; expected {dtype}. Go on with the moments=… that it was kept by"
        )
    return torch.empty_like(like, dtype=dtype, device=value.device).copy_(value)


def dense_like(tensor: Tensor) -> Tensor:
    """Without memory: the order in which the tensor's elements are stepped."""
    return torch.empty_like(tensor, device="meta")


def flat(tensor: Tensor) -> Tensor:
    """The elements in the order of memory, which they fill."""
    if tensor.is_contiguous():
        return tensor
    return tensor.as_strided((tensor.numel(),), (1,))


def _flat(state: dict[str, Any], name: str | None) -> Tensor | None:
    tensor = None if name is None else state.get(name)
    return None if tensor is None else flat(tensor)
