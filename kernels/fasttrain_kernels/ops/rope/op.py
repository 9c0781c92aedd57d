"""Rotary position embedding as PyTorch sees it: two opaque ops, a thin autograd function, `rope`.

Kernels see tables alone; what angles are made of stays in table.py. As in ops/rms_norm the backend
is chosen inside the ops, and every backend saves the same tensors: the table, and with norms the
inputs, from which the backward pass computes the norm again.
"""

from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels import checks
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.rms_norm.reference import STYLES as NORM_STYLES
from fasttrain_kernels.ops.rope import reference
from fasttrain_kernels.ops.rope.reference import Problem
from fasttrain_kernels.ops.rope.table import frequencies, positions_of, rope_table
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.rope"


def describe(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    style: str = "half",
    norm_style: str | None = None,
    query_heads: int = 0,
    key_heads: int = 0,
    rows: int = 0,
) -> Problem:
    """The problem of rotating the heads, of `head_dim` elements, of `rows` tokens."""
    form, heads = (style, norm_style), (query_heads, key_heads)
    return Problem(torch.device(device), dtype, head_dim, *form, *heads, rounded(rows))


ROPE = Op(
    "rope",
    candidates=(
        Candidate("triton", f"{FOLDER}.triton_kernel", devices=("cuda",)),
        Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
        Candidate("compile", f"{FOLDER}.compile_provider", devices=("cpu", "cuda"), provider=True),
    ),
    folder=FOLDER,
    describe=describe,
    example={"head_dim": 128, "query_heads": 32, "key_heads": 8},
)

library = torch.library.Library("fasttrain", "FRAGMENT")
library.define(
    "rope_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, "
    "float eps, str norm_style, str style, str backend) -> (Tensor, Tensor)"
)
library.define(
    "rope_backward(Tensor? dq, Tensor? dk, Tensor? q, Tensor? k, Tensor cos, Tensor sin, "
    "Tensor? q_norm, Tensor? k_norm, float eps, str norm_style, str style, bool[] needs, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_style: str,
    style: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = map(checks.without_gaps, (q, k, cos, sin))
    result: tuple[Tensor, Tensor] = ROPE.run(
        "forward",
        _problem(q, k, style, None if q_norm is None and k_norm is None else norm_style),
        backend,
        lambda kernel: kernel.forward(q, k, cos, sin, q_norm, k_norm, eps, norm_style, style),
    )
    return result


def _backward(
    dq: Tensor | None,
    dk: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_style: str,
    style: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = [None if t is None else checks.without_gaps(t) for t in (dq, dk, q, k)]
    cos, sin = checks.without_gaps(cos), checks.without_gaps(sin)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = ROPE.run(
        "backward",
        _problem(dq, dk, style, None if q_norm is None and k_norm is None else norm_style),
        backend,
        lambda kernel: kernel.backward(
            *heads, cos, sin, q_norm, k_norm, eps, norm_style, style, needs
        ),
    )
    return result


def _problem(q: Tensor | None, k: Tensor | None, style: str, norm_style: str | None) -> Problem:
    """Of queries and keys, or of their gradients, of which one may be missing."""
    some = k if q is None else q
    assert some is not None
    heads = [0 if tensor is None else tensor.shape[1] for tensor in (q, k)]
    return describe(
        device=some.device,
        dtype=some.dtype,
        head_dim=some.shape[2],
        style=style,
        norm_style=norm_style,
        query_heads=heads[0],
        key_heads=heads[1],
        rows=some.shape[0],
    )


def _forward_fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_style: str,
    style: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _backward_fake(
    dq: Tensor | None,
    dk: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_style: str,
    style: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    some = dk if dq is None else dq
    assert some is not None

    def gradient(of: Tensor | None, needed: bool) -> Tensor:
        return some.new_empty(0) if of is None or not needed else of.new_empty(of.shape)

    dq_norm = None if dq is None else q_norm
    dk_norm = None if dk is None else k_norm
    found = (gradient(*pair) for pair in zip((dq, dk, dq_norm, dk_norm), needs, strict=True))
    dq_in, dk_in, dq_weight, dk_weight = found
    return dq_in, dk_in, dq_weight, dk_weight


library.impl("rope_forward", _forward, "CompositeExplicitAutograd")
library.impl("rope_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fasttrain::rope_forward", _forward_fake, lib=library)
torch.library.register_fake("fasttrain::rope_backward", _backward_fake, lib=library)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        norm_style: str,
        style: str,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        results = torch.ops.fasttrain.rope_forward(
            q, k, cos, sin, q_norm, k_norm, eps, norm_style, style, backend
        )
        inputs = (None, None) if q_norm is None else (q, k)
        ctx.save_for_backward(*inputs, cos, sin, q_norm, k_norm)
        ctx.options = (eps, norm_style, style)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        q_turned, k_turned = results
        return q_turned, k_turned

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("rope is differentiable once: create_graph=True is not served")
        given = (dq, dk, dq, dk)
        wanted = zip(given, ctx.needs_input_grad[:4], strict=True)
        needs = [grad is not None and needed for grad, needed in wanted]
        if not any(needs):
            return (None,) * 10
        grads = torch.ops.fasttrain.rope_backward(
            dq, dk, *ctx.saved_tensors, *ctx.options, needs, ctx.backend
        )
        found = (g if needed else None for g, needed in zip(grads, needs, strict=True))
        return (*found, *(None,) * 6)


def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    theta: float | None = None,
    inv_freq: Tensor | None = None,
    scaling: float = 1.0,
    table: tuple[Tensor, Tensor] | None = None,
    style: str = "half",
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    norm_style: str = "llama",
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned by the angles of their positions; float32 inside.

    q (T, Hq, D), k (T, Hk, D) of one dtype -> (q', k'), new and contiguous. Inputs and gradients
    may have any strides: only where the last dimension has gaps is a copy made.

    Angles: a `table` (cos, sin), each (T, R/2) with R <= D, which `rope_table` makes and a model's
    layers share; its rows may lie apart. Or `positions` (T,), or `cu_seqlens` (documents + 1,),
    from which positions restart in each document, with `inv_freq` (R/2,) or `theta` (R = D; its
    powers are formed in float64), and `scaling` of both cos and sin. Elements of a head from R on
    pass through unchanged.

    style: "half" turns pairs (i, i + R/2), as Llama's rotate_half; "interleaved" pairs
    (2i, 2i + 1), as GPT-J and Cohere. q_norm, k_norm (D,): weights of an RMS norm of each head
    before it is turned, in one pass, with `eps` and `norm_style` as rms_norm has them; rounded
    once, at the end.

    Differentiable once, in q, k and the norms' weights; bitwise repeatable on one device. Without
    norms nothing of q and k is saved. backend: as for rms_norm.

    Raises ValueError for shapes, dtypes, devices or angles that don't fit and for tables that want
    a gradient, UnsupportedKernel where the backend asked for can't serve. Formulas and source:
    ops/rope/reference.py.
    """
    checks.one_of("rope", "style", style, reference.STYLES)
    checks.one_of("rope", "norm_style", norm_style, NORM_STYLES)
    _check_heads(q, k, q_norm, k_norm)
    _check_angles(table, positions, cu_seqlens, theta, inv_freq, scaling)
    if table is None:
        if cu_seqlens is not None:
            positions = positions_of(cu_seqlens, q.shape[0])
        if theta is not None:
            inv_freq = frequencies(theta, q.shape[2], q.device)
        assert positions is not None and inv_freq is not None
        checks.same_device("rope", q=q, positions=positions, inv_freq=inv_freq)
        table = rope_table(positions, inv_freq, scaling=scaling)
    cos, sin = table
    _check_table(cos, sin, q)
    # eps + 0.0: as in rms_norm, a new symbol for Dynamo.
    result: tuple[Tensor, Tensor] = _Rope.apply(
        q, k, q_norm, k_norm, cos, sin, eps + 0.0, norm_style, style, backend
    )
    return result


def _check_heads(q: Tensor, k: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    fits = q.dim() == k.dim() == 3 and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2] > 0
    if not fits or q.dtype != k.dtype:
        q_is, k_is = (f"{tuple(t.shape)} of {checks.short(t.dtype)}" for t in (q, k))
        raise ValueError(
            "rope: q (T, Hq, D) and k (T, Hk, D) must have one T, one D > 0 and one dtype; q is "
            f"{q_is}, k {k_is}"
        )
    if (q_norm is None) != (k_norm is None):
        missing = "q_norm" if q_norm is None else "k_norm"
        raise ValueError(f"rope: q_norm and k_norm come together; {missing} is missing")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != q.shape[2:]:
            raise ValueError(f"rope: {name} {tuple(weight.shape)} must be (D,), ({q.shape[2]},)")
    checks.floating("rope", q=q, k=k, q_norm=q_norm, k_norm=k_norm)
    checks.same_device("rope", q=q, k=k, q_norm=q_norm, k_norm=k_norm)


def _check_angles(
    table: tuple[Tensor, Tensor] | None,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    theta: float | None,
    inv_freq: Tensor | None,
    scaling: float,
) -> None:
    named = {"positions": positions, "cu_seqlens": cu_seqlens, "theta": theta, "inv_freq": inv_freq}
    given = [name for name, value in named.items() if value is not None]
    if table is not None:
        given += ["scaling"] if scaling != 1.0 else []
        if given:
            raise ValueError(f"rope: a table holds all angles; drop {', '.join(given)}")
    elif (positions is None) == (cu_seqlens is None) or (theta is None) == (inv_freq is None):
        raise ValueError(
            "rope: angles are a table, or one of positions and cu_seqlens with one of theta and "
            f"inv_freq; got {', '.join(given) or 'none'}"
        )


def _check_table(cos: Tensor, sin: Tensor, q: Tensor) -> None:
    tokens, _, head_dim = q.shape
    fits = cos.dim() == 2 and cos.shape == sin.shape and cos.shape[0] == tokens
    if not fits or not 0 < 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (T, R/2) with "
            f"0 < R <= D; q (T, Hq, D) is {tuple(q.shape)}"
        )
    checks.floating("rope", cos=cos, sin=sin)
    checks.same_device("rope", q=q, cos=cos, sin=sin)
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope: the table wants a gradient, and gets none; detach it")
