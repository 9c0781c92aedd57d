"""What swiglu and geglu have in common as PyTorch sees them: opaque ops and an autograd function.

The backend is chosen inside the ops, where torch.compile doesn't look. Nothing is saved but the
inputs, and the activation is computed again in the backward pass. A packed tensor (..., 2I) holds
gate and up side by side, as one projection makes them, and gets one gradient.
"""

from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels import checks
from fasttrain_kernels.ops.swiglu.reference import Problem
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import Candidate, find

FOLDER = "fasttrain_kernels.ops.swiglu"
CANDIDATES = (
    Candidate("triton", f"{FOLDER}.triton_kernel", devices=("cuda",)),
    Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
    Candidate("liger", f"{FOLDER}.liger_provider", devices=("cuda",), provider=True),
    Candidate("compile", f"{FOLDER}.compile_provider", devices=("cpu", "cuda"), provider=True),
)

library = torch.library.Library("fasttrain", "FRAGMENT")
library.define(
    "glu_forward(Tensor gate, Tensor? up, str op, str activation, str backend) -> Tensor y"
)
library.define(
    "glu_backward(Tensor dy, Tensor gate, Tensor? up, str op, str activation, bool needs_dgate, "
    "bool needs_dup, str backend) -> (Tensor dgate, Tensor dup)"
)


def describe(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    activation: str = "silu",
    width: int = 0,
    rows: int = 0,
) -> Problem:
    """The problem of gating `rows` rows of `width` elements each."""
    return Problem(torch.device(device), dtype, activation, width, rounded(rows))


def _forward(gate: Tensor, up: Tensor | None, op: str, activation: str, backend: str) -> Tensor:
    halves = _halves(gate, up)

    def call(kernel: Any) -> Tensor:
        y = _empty_y(gate, up)
        kernel.forward(*halves, activation, checks.rows(y))
        return y

    y: Tensor = find(op).run("forward", _problem(halves[0], activation), backend, call)
    return y


def _backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    op: str,
    activation: str,
    needs_dgate: bool,
    needs_dup: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    halves, dy_rows = _halves(gate, up), checks.rows(dy)

    def call(kernel: Any) -> tuple[Tensor, Tensor]:
        dgate, dup = _empty_gradients(gate, needs_dgate, needs_dup)
        dgate_rows = checks.rows(dgate) if needs_dgate else None
        dup_rows = checks.rows(dup) if needs_dup else None
        if up is None:
            dgate_rows, dup_rows = _halves(dgate, None)
        kernel.backward(dy_rows, *halves, activation, dgate_rows, dup_rows)
        return dgate, dup

    gradients: tuple[Tensor, Tensor] = find(op).run(
        "backward", _problem(halves[0], activation), backend, call
    )
    return gradients


def _problem(gate: Tensor, activation: str) -> Problem:
    count, width = gate.shape
    return Problem(gate.device, gate.dtype, activation, width, rounded(count))


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up as rows (N, I); without up, views of the halves of a packed tensor's rows."""
    if up is not None:
        return checks.rows(gate), checks.rows(up)
    first, second = checks.rows(gate).chunk(2, dim=1)
    return first, second


def _empty_y(gate: Tensor, up: Tensor | None) -> Tensor:
    width = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    return gate.new_empty((*gate.shape[:-1], width))


def _empty_gradients(gate: Tensor, needs_dgate: bool, needs_dup: bool) -> tuple[Tensor, Tensor]:
    """What isn't needed is empty. A packed tensor's gradient is dgate."""
    return (
        gate.new_empty(gate.shape if needs_dgate else 0),
        gate.new_empty(gate.shape if needs_dup else 0),
    )


def _forward_fake(
    gate: Tensor, up: Tensor | None, op: str, activation: str, backend: str
) -> Tensor:
    return _empty_y(gate, up)


def _backward_fake(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    op: str,
    activation: str,
    needs_dgate: bool,
    needs_dup: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(gate, needs_dgate, needs_dup)


library.impl("glu_forward", _forward, "CompositeExplicitAutograd")
library.impl("glu_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fasttrain::glu_forward", _forward_fake, lib=library)
torch.library.register_fake("fasttrain::glu_backward", _backward_fake, lib=library)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, op: str, activation: str, backend: str
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.op, ctx.activation, ctx.backend = op, activation, backend
        y: Tensor = torch.ops.fasttrain.glu_forward(gate, up, op, activation, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{ctx.op} is differentiable once: create_graph=True is not served")
        gate, up = ctx.saved_tensors
        needs_dgate, needs_dup = ctx.needs_input_grad[:2]
        dgate, dup = torch.ops.fasttrain.glu_backward(
            dy, gate, up, ctx.op, ctx.activation, needs_dgate, needs_dup, ctx.backend
        )
        return dgate if needs_dgate else None, dup if needs_dup else None, None, None, None


def _check(op: str, gate: Tensor, up: Tensor | None) -> None:
    if gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(f"{op}: gate {tuple(gate.shape)} must be (..., I) with I > 0")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(
            f"{op}: without up, gate holds both side by side, (..., 2I); it is {tuple(gate.shape)}"
        )
    if up is not None and up.shape != gate.shape:
        raise ValueError(
            f"{op}: up {tuple(up.shape)} must have the shape of gate, {tuple(gate.shape)}"
        )
    checks.floating(op, gate=gate, up=up)
    if up is not None and up.dtype != gate.dtype:
        raise ValueError(
            f"{op}: up is {checks.short(up.dtype)}; expected gate's {checks.short(gate.dtype)}"
        )
    checks.same_device(op, gate=gate, up=up)


def glu(op: str, gate: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    """activation(gate) * up, as the op of this name; raises ValueError for what doesn't fit."""
    _check(op, gate, up)
    y: Tensor = _Glu.apply(gate, up, op, activation, backend)
    return y
