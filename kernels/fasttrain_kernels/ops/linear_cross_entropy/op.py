"""The fused head as PyTorch sees it: two opaque ops, an autograd function, `linear_cross_entropy`.

The backend is chosen inside the ops, where torch.compile doesn't look. The forward op returns the
gradients too where it can (by rows); else the backward op makes them (by panels). It can where the
loss is one number, so that all that is unknown is one factor.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels import losses
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.losses import LossOutput
from fasttrain_kernels.ops.cross_entropy.reference import (
    FIELDS,
    Terms,
    compute_dtype,
    outcome,
    targets_of,
)
from fasttrain_kernels.ops.linear_cross_entropy.arguments import check_shapes, product_dtype
from fasttrain_kernels.ops.linear_cross_entropy.reference import Head, Pair, Problem
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import Candidate, find
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.linear_cross_entropy"
NAME = "linear_cross_entropy"

CANDIDATES = (
    Candidate("triton", f"{FOLDER}.triton_kernel", devices=("cuda",)),
    Candidate("cuda", f"{FOLDER}.cuda_kernel", devices=("cuda",), isolated=True),
    Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
)


def describe(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    classes: int,
    width: int = 0,
    rows: int = 0,
) -> Problem:
    """The problem of a head from `width` to `classes`, whose products have operands of `dtype`, and
    of `rows` positions that count."""
    return Problem(torch.device(device), dtype, classes, width, rounded(rows))


LINEAR_CROSS_ENTROPY = Op(
    NAME,
    candidates=CANDIDATES,
    folder=FOLDER,
    describe=describe,
    example={"classes": 32000, "width": 4096},
)


library = torch.library.Library("fasttrain", "FRAGMENT")
# factors: left, right, left, right, ... of the pairs; terms: the four of Terms, softcap 0 for none.
# gradients: as Head.tensors(), empty where not wanted; none at all where none is.
library.define(
    "linear_cross_entropy_forward(Tensor[] factors, Tensor? bias, Tensor? rows, Tensor targets, "
    "Tensor coefficients, float[] terms, bool[] wanted, bool wants_entropy, ScalarType dtype, "
    "str op, str backend) -> (Tensor statistics, Tensor[] gradients)"
)
library.define(
    "linear_cross_entropy_backward(Tensor[] factors, Tensor? bias, Tensor? rows, Tensor targets, "
    "Tensor coefficients, float[] terms, bool[] wanted, Tensor statistics, ScalarType dtype, "
    "str op, str backend) -> Tensor[] gradients"
)


def _head(factors: Sequence[Tensor], bias: Tensor | None) -> Head:
    return Head(tuple(map(Pair, factors[0::2], factors[1::2])), bias)


def _problem(head: Head, targets: Tensor, dtype: torch.dtype) -> Problem:
    classes, width = head.pairs[0].right.shape
    return Problem(targets.device, dtype, classes, width, rounded(targets.shape[0]))


def _own_dtypes(head: Head) -> AbstractContextManager[Any]:
    """Autocast has had its say in the operands' dtype: here it would narrow what is made wide."""
    device = head.pairs[0].right.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _filled(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Lists of tensors know no None: what is not wanted is empty."""
    return [like.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _forward(
    factors: Sequence[Tensor],
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    terms: Sequence[float],
    wanted: Sequence[bool],
    wants_entropy: bool,
    dtype: torch.dtype,
    op: str,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    head = _head(factors, bias)
    arguments = (head, rows, targets, coefficients, losses.unpacked(terms), wants_entropy)
    with _own_dtypes(head):
        statistics, gradients = find(op).run(
            "forward",
            _problem(head, targets, dtype),
            backend,
            lambda kernel: kernel.forward(*arguments, tuple(wanted), dtype),
        )
    return statistics, _filled(gradients, coefficients)


def _backward(
    factors: Sequence[Tensor],
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    terms: Sequence[float],
    wanted: Sequence[bool],
    statistics: Tensor,
    dtype: torch.dtype,
    op: str,
    backend: str,
) -> list[Tensor]:
    head = _head(factors, bias)
    arguments = (head, rows, targets, coefficients, statistics, losses.unpacked(terms))
    with _own_dtypes(head):
        gradients = find(op).run(
            "backward",
            _problem(head, targets, dtype),
            backend,
            lambda kernel: kernel.backward(*arguments, tuple(wanted), dtype),
        )
    return _filled(gradients, coefficients)


def _gradients_fake(
    factors: Sequence[Tensor], bias: Tensor | None, wanted: Sequence[bool], like: Tensor
) -> list[Tensor]:
    tensors = _head(factors, bias).tensors()
    shaped = (
        tensor.new_empty(tensor.shape) if wants and tensor is not None else None
        for tensor, wants in zip(tensors, wanted, strict=True)
    )
    return _filled(tuple(shaped), like)


def _forward_fake(
    factors: Sequence[Tensor],
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    terms: Sequence[float],
    wanted: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, list[Tensor]]:
    gradients = _gradients_fake(factors, bias, wanted, coefficients) if any(wanted) else []
    return coefficients.new_empty(targets.shape[0], FIELDS), gradients


def _backward_fake(
    factors: Sequence[Tensor],
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    terms: Sequence[float],
    wanted: Sequence[bool],
    *options: Any,
) -> list[Tensor]:
    return _gradients_fake(factors, bias, wanted, coefficients)


library.impl("linear_cross_entropy_forward", _forward, "CompositeExplicitAutograd")
library.impl("linear_cross_entropy_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fasttrain::linear_cross_entropy_forward", _forward_fake, lib=library)
torch.library.register_fake("fasttrain::linear_cross_entropy_backward", _backward_fake, lib=library)


class Call(NamedTuple):
    """What a call says beside its tensors."""

    terms: tuple[float, float, float, float]
    reduction: str
    wants_entropy: bool
    differentiable: bool  # whether gradients are recorded
    by_panels: bool  # whether the backward pass makes them
    dtype: torch.dtype  # of the products' operands
    op: str  # whose settings choose the backend
    backend: str


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        targets: Tensor,
        rows: Tensor | None,
        token_weights: Tensor | None,
        num_items: Tensor | float | None,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(factors[0].dtype)
        coefficients = losses.row_coefficients(
            targets, token_weights, num_items, call.reduction, dtype
        )
        wanted = [*ctx.needs_input_grad[6:], ctx.needs_input_grad[5]]  # factors, bias
        now = call.differentiable and not call.by_panels
        statistics, gradients = torch.ops.fasttrain.linear_cross_entropy_forward(
            factors,
            bias,
            rows,
            targets,
            coefficients,
            call.terms,
            wanted if now else [False] * len(wanted),
            call.wants_entropy,
            call.dtype,
            call.op,
            call.backend,
        )
        ctx.call, ctx.wanted = call, wanted
        if call.by_panels:
            ctx.save_for_backward(targets, coefficients, statistics, rows, bias, *factors)
        else:
            ctx.save_for_backward(*gradients)
        found = outcome(statistics, targets, losses.unpacked(call.terms), factors[1].shape[0])
        loss = losses.reduced(found.losses, coefficients, call.reduction)
        ctx.mark_non_differentiable(found.log_probs, found.entropy)
        ctx.set_materialize_grads(False)
        return loss, found.log_probs, found.entropy

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{ctx.call.op} is differentiable once: no create_graph=True")
        if dloss is None:
            return (None,) * (5 + len(ctx.wanted))
        if ctx.call.by_panels:
            found = _backward_by_panels(ctx.call, ctx.wanted, dloss, ctx.saved_tensors)
        else:
            found = [losses.scaled(gradient, dloss) for gradient in ctx.saved_tensors]
        found = [grad if wants else None for grad, wants in zip(found, ctx.wanted, strict=True)]
        return (None, None, None, None, None, found[-1], *found[:-1])


def _backward_by_panels(
    call: Call, wanted: list[bool], dloss: Tensor, saved: Sequence[Any]
) -> list[Any]:
    targets, coefficients, statistics, rows, bias, *factors = saved
    found: list[Any] = torch.ops.fasttrain.linear_cross_entropy_backward(
        factors,
        bias,
        rows,
        targets,
        coefficients * dloss,
        call.terms,
        wanted,
        statistics,
        call.dtype,
        call.op,
        call.backend,
    )
    return found


def fused(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None,
    bias: Tensor | None,
    adapter: tuple[Tensor, Tensor] | None,
    ignore_index: int,
    reduction: str,
    num_items: Tensor | float | None,
    terms: Terms,
    token_weights: Tensor | None,
    wants_entropy: bool,
    recompute: bool | None,
    backend: str,
) -> LossOutput:
    """What the public functions share; `op` is the one whose name stands in errors and settings."""
    factors = [hidden, weight, *(adapter or ())]
    check_shapes(op, factors, bias, labels, rows)
    losses.check_options(op, labels, reduction, num_items, terms, token_weights)
    dtype = product_dtype(op, factors, bias)
    shape, labels = labels.shape, labels.reshape(-1)
    factors = [factors[0].flatten(0, -2), weight, *factors[2:]]
    if adapter is not None:
        factors[2] = factors[2].flatten(0, -2)
    if token_weights is not None:
        token_weights = token_weights.reshape(-1)
    if rows is None:
        rows = losses.counting_rows(labels, ignore_index)
    count = labels.numel()
    if rows is not None:
        labels = labels.index_select(0, rows)
        token_weights = None if token_weights is None else token_weights.index_select(0, rows)
    targets = targets_of(labels, ignore_index, weight.shape[0])
    losses.check_labels(op, labels, rows, ignore_index, weight.shape[0], targets)
    if recompute is None:
        recompute = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
    # A float16 gradient needs the loss scale that comes with the backward pass.
    by_panels = recompute or reduction == "none" or dtype == torch.float16
    call = Call(
        losses.packed(terms),
        reduction,
        wants_entropy,
        torch.is_grad_enabled(),
        by_panels,
        dtype,
        op,
        backend,
    )
    loss, log_probs, entropy = _LinearCrossEntropy.apply(
        call, targets, rows, token_weights, num_items, bias, *factors
    )
    per_row = (losses.spread(x, rows, count).view(shape) for x in (log_probs, entropy))
    if reduction == "none":
        loss = losses.spread(loss, rows, count).view(shape)
    return LossOutput(loss, *per_row)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    return_log_probs: bool = False,
    return_entropy: bool = False,
    recompute: bool | None = None,
    backend: str = AUTO,
) -> Tensor | LossOutput:
    """Cross-entropy, in nats, of the logits hidden @ weight.T, of which few exist at a time.

    hidden (..., H), weight (V, H), labels (...) integers. The logits are softcap(scale * (hidden @
    weight.T + bias + inner @ outer.T)): bias (V,); adapter = inner (..., R) and outer (V, R), a
    low-rank addition to the layer; softcap(x) = softcap * tanh(x / softcap). The loss is float32
    (float64 for float64), () or, with reduction "none", of the shape of labels, 0 where ignored.

    rows: (S,) int64, the positions (of the flattened labels) that count, each at most once. Given
    them, nothing waits for the device. Without them they are looked for, which on a GPU waits once;
    in a compiled graph, or one that is being captured, every position is computed instead.
    reduction "mean" divides by num_items (a number, or a tensor of one on the device: to fetch it
    from elsewhere would wait), by default the number of labels that count. Where nothing counts the
    loss is 0.
    label_smoothing, z_loss: see ops/cross_entropy/reference.py. token_weights (...): what each loss
    is multiplied by; they get no gradient.
    return_log_probs, return_entropy: return a LossOutput with them, without gradients.
    recompute: True makes the logits twice, rather than gradients in the forward pass: 4/3 of the
    FLOPs, the least memory. None: only where it must be (reduction "none", and float16, whose
    gradients need the loss scale that comes with the backward pass), and on a CPU for 16-bit
    weights, whose gradient would be added up in a float32 copy.

    A label that is neither a class nor ignore_index is a ValueError on a CPU, and on a GPU inside
    `use(checked=True)`. Elsewhere, and in compiled graphs, it makes loss and gradients NaN.

    Under autocast, products have operands of autocast's dtype on a GPU. On a CPU operands are
    always widened to float32. Gradients are added up in float32 from chunk to chunk, and rounded
    once, or twice where the loss is scaled; what cuBLAS does within a product is its own setting
    (torch.backends.cuda.matmul). Bitwise repeatable. Differentiable once.

    Raises ValueError for shapes, dtypes, devices and options that don't fit, UnsupportedKernel
    where the backend asked for can't serve.
    """
    found = fused(
        NAME,
        hidden,
        weight,
        labels,
        rows=rows,
        bias=bias,
        adapter=adapter,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        terms=Terms(scale, softcap, label_smoothing, z_loss),
        token_weights=token_weights,
        wants_entropy=return_entropy,
        recompute=recompute,
        backend=backend,
    )
    return losses.output(found, return_log_probs, return_entropy)
