"""RMS normalisation as PyTorch sees it: two opaque ops, a thin autograd function, `rms_norm`.

The backend is chosen inside the ops, where torch.compile doesn't look, so that a compiled graph
still follows `use()` and the environment. Every backend saves the same tensors, so the forward and
the backward pass may legally run on different ones.
"""

from typing import Any, overload

import torch
from torch import Tensor

from fasttrain_kernels import checks
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.rms_norm import reference
from fasttrain_kernels.ops.rms_norm.reference import Problem
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.rms_norm"


def describe(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    width: int,
    weight_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    style: str = "llama",
    rows: int = 0,
) -> Problem:
    """The problem of normalising rows of `width` elements; weights are of `dtype` unless said."""
    checks.one_of("rms_norm", "style", style, reference.STYLES)
    dtypes = (weight_dtype or dtype, residual_dtype)
    return Problem(torch.device(device), dtype, width, *dtypes, style, rounded(rows))


RMS_NORM = Op(
    "rms_norm",
    candidates=(
        Candidate("triton", f"{FOLDER}.triton_kernel", devices=("cuda",)),
        Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
        Candidate("liger", f"{FOLDER}.liger_provider", devices=("cuda",), provider=True),
        Candidate("compile", f"{FOLDER}.compile_provider", devices=("cpu", "cuda"), provider=True),
    ),
    folder=FOLDER,
    describe=describe,
    example={"width": 4096},
)

library = torch.library.Library("fasttrain", "FRAGMENT")
library.define(
    "rms_norm_forward(Tensor x, Tensor weight, float eps, Tensor? residual, str style, "
    "str backend) -> (Tensor y, Tensor sum, Tensor rstd)"
)
library.define(
    "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd, str style, "
    "bool needs_dx, bool needs_dweight, str backend) -> (Tensor dx, Tensor dweight)"
)


def _forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, style: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    residual_dtype = None if residual is None else residual.dtype
    rows, residual_rows = checks.rows(x), None if residual is None else checks.rows(residual)
    y, total, rstd = RMS_NORM.run(
        "forward",
        _problem(rows, weight, residual_dtype, style),
        backend,
        lambda kernel: kernel.forward(rows, weight, eps, residual_rows, style),
    )
    return _shaped(y, x), total if residual is None else _shaped(total, x), rstd


def _backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    style: str,
    needs_dx: bool,
    needs_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows, dy_rows = checks.rows(x), checks.rows(dy)
    dsum_rows = None if dsum is None else checks.rows(dsum)
    dx, dweight = RMS_NORM.run(
        "backward",
        _problem(rows, weight, None if dsum is None else dsum.dtype, style),
        backend,
        lambda kernel: kernel.backward(
            dy_rows, dsum_rows, rows, weight, rstd, style, needs_dx, needs_dweight
        ),
    )
    return _shaped(dx, x) if needs_dx else dx, dweight


def _problem(
    rows: Tensor, weight: Tensor, residual_dtype: torch.dtype | None, style: str
) -> Problem:
    count, width = rows.shape
    dtypes = (weight.dtype, residual_dtype)
    return Problem(rows.device, rows.dtype, width, *dtypes, style, rounded(count))


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """`rows` in the shape of `like`; no view for autograd, which forbids `y *= 2` on a view that a
    custom function returns."""
    return rows if like.dim() == 2 else torch.ops.aten._unsafe_view(rows, like.shape)


def _forward_fake(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, style: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    residual_dtype = None if residual is None else residual.dtype
    total_dtype = reference.sum_dtype(x.dtype, residual_dtype)
    y_dtype = reference.output_dtype(x.dtype, residual_dtype, weight.dtype, style)
    rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape, dtype=y_dtype),
        x.new_empty(0 if residual is None else x.shape, dtype=total_dtype),
        x.new_empty(rows, dtype=reference.compute_dtype(total_dtype)),
    )


def _backward_fake(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    style: str,
    needs_dx: bool,
    needs_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_dx else 0),
        weight.new_empty(weight.shape if needs_dweight else 0),
    )


library.impl("rms_norm_forward", _forward, "CompositeExplicitAutograd")
library.impl("rms_norm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fasttrain::rms_norm_forward", _forward_fake, lib=library)
torch.library.register_fake("fasttrain::rms_norm_backward", _backward_fake, lib=library)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor | None,
        style: str,
        backend: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, total, rstd = torch.ops.fasttrain.rms_norm_forward(
            x, weight, eps, residual, style, backend
        )
        ctx.save_for_backward(x if residual is None else total, weight, rstd)
        ctx.style, ctx.backend = style, backend
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, total)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("rms_norm is differentiable once: create_graph=True is not served")
        x, weight, rstd = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        needs_dweight = ctx.needs_input_grad[1]
        if dy is None:  # only the sum was used
            dx, dweight = dsum, None
        else:
            dx, dweight = torch.ops.fasttrain.rms_norm_backward(
                dy, dsum, x, weight, rstd, ctx.style, needs_dx, needs_dweight, ctx.backend
            )
        x_dtype, residual_dtype = ctx.dtypes
        return (
            dx.to(x_dtype) if dx is not None and ctx.needs_input_grad[0] else None,
            dweight if needs_dweight else None,
            None,
            dx.to(residual_dtype) if dx is not None and ctx.needs_input_grad[3] else None,
            None,
            None,
        )


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"rms_norm: weight {tuple(weight.shape)} must be (H,) for x (..., H) with H > 0; "
            f"x is {tuple(x.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"rms_norm: residual {tuple(residual.shape)} must have the shape of x, {tuple(x.shape)}"
        )
    checks.floating("rms_norm", x=x, weight=weight, residual=residual)
    checks.same_device("rms_norm", x=x, weight=weight, residual=residual)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = ...,
    *,
    residual: None = ...,
    style: str = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = ...,
    *,
    residual: Tensor,
    style: str = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    style: str = "llama",
    backend: str = AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; float32 inside.

    x (..., H), weight (H,) -> y (..., H). With `residual` (..., H), as x: normalises
    x + residual, and returns (y, x + residual), both differentiable.

    style: "llama" rounds to the input's dtype before it multiplies by weight; "gemma" multiplies
    by 1 + weight in float32; "olmo2" by weight in float32. y has the input's dtype, for "llama"
    promoted with the weight's: float32 weights times bfloat16 activations give float32, as
    transformers' LlamaRMSNorm does. With residual, "the input" is the sum, of the promoted dtype.

    backend: "auto", or the name of one that must serve ("triton", "cpu", "eager"); `use()` and
    FASTTRAIN_KERNELS go before it. Bitwise repeatable on one device. Differentiable once.

    Raises ValueError for shapes, dtypes or devices that don't fit, UnsupportedKernel where the
    backend asked for can't serve. Formulas and source: ops/rms_norm/reference.py.
    """
    checks.one_of("rms_norm", "style", style, reference.STYLES)
    _check(x, weight, residual)
    # A float that two calls share (a default, a config's value) is one symbol under
    # torch.compile(dynamic=True), and Dynamo (2.13) can't hand one symbol to a second autograd
    # function: the sum is a new one.
    result: Tensor | tuple[Tensor, Tensor] = _RmsNorm.apply(
        x, weight, eps + 0.0, residual, style, backend
    )
    return result
