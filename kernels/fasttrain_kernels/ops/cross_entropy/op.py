"""Cross-entropy of logits as PyTorch sees it: opaque ops, an autograd function, `cross_entropy`.

The forward op keeps five numbers a row; the backward op makes the gradient of them and of the
logits, in memory of its own or, where that is allowed, in the logits'.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels import checks, losses
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.losses import LossOutput
from fasttrain_kernels.ops.cross_entropy.reference import (
    FIELDS,
    Problem,
    Terms,
    compute_dtype,
    outcome,
    targets_of,
)
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.cross_entropy"
NAME = "cross_entropy"


def describe(
    *, device: torch.device | str, dtype: torch.dtype, classes: int, rows: int = 0
) -> Problem:
    """The problem of `rows` rows of logits of `classes` classes."""
    return Problem(torch.device(device), dtype, classes, rows=rounded(rows))


CROSS_ENTROPY = Op(
    NAME,
    candidates=(
        Candidate("triton", f"{FOLDER}.triton_kernel", devices=("cuda",)),
        Candidate("cuda", f"{FOLDER}.cuda_kernel", devices=("cuda",), isolated=True),
        Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
    ),
    folder=FOLDER,
    describe=describe,
    example={"classes": 32000},
)

library = torch.library.Library("fasttrain", "FRAGMENT")
# terms: the four of Terms, softcap 0 for none.
library.define(
    "cross_entropy_forward(Tensor logits, Tensor targets, float[] terms, bool wants_entropy, "
    "str backend) -> Tensor statistics"
)
library.define(
    "cross_entropy_backward(Tensor logits, Tensor targets, Tensor statistics, "
    "Tensor coefficients, float[] terms, str backend) -> Tensor gradient"
)
library.define(
    "cross_entropy_backward_(Tensor(a!) logits, Tensor targets, Tensor statistics, "
    "Tensor coefficients, float[] terms, str backend) -> ()"
)


def _problem(logits: Tensor) -> Problem:
    count, classes = logits.shape
    return Problem(logits.device, logits.dtype, classes, rows=rounded(count))


def _forward(
    logits: Tensor, targets: Tensor, terms: Sequence[float], wants_entropy: bool, backend: str
) -> Tensor:
    def call(kernel: Any) -> Tensor:
        statistics = _forward_fake(logits, targets, terms, wants_entropy, backend)
        kernel.forward(
            checks.rows(logits), targets, losses.unpacked(terms), statistics, wants_entropy
        )
        return statistics

    statistics: Tensor = CROSS_ENTROPY.run("forward", _problem(logits), backend, call)
    return statistics


def _backward(
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    coefficients: Tensor,
    terms: Sequence[float],
    backend: str,
) -> Tensor:
    rows, classes = checks.rows(logits), logits.shape[1]
    arguments = (targets, losses.unpacked(terms), statistics, coefficients)

    def call(kernel: Any) -> Tensor:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        kernel.backward(rows, *arguments, out, 0, classes)
        return out

    gradient: Tensor = CROSS_ENTROPY.run("backward", _problem(logits), backend, call)
    return gradient


def _backward_in_place(
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    coefficients: Tensor,
    terms: Sequence[float],
    backend: str,
) -> None:
    arguments = (targets, losses.unpacked(terms), statistics, coefficients, logits)
    CROSS_ENTROPY.run(
        "backward",
        _problem(logits),
        backend,
        lambda kernel: kernel.backward(logits, *arguments, 0, logits.shape[1]),
        repeatable=False,
    )


def _forward_fake(
    logits: Tensor, targets: Tensor, terms: Sequence[float], wants_entropy: bool, backend: str
) -> Tensor:
    return logits.new_empty(logits.shape[0], FIELDS, dtype=compute_dtype(logits.dtype))


def _backward_fake(logits: Tensor, *options: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


library.impl("cross_entropy_forward", _forward, "CompositeExplicitAutograd")
library.impl("cross_entropy_backward", _backward, "CompositeExplicitAutograd")
library.impl("cross_entropy_backward_", _backward_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("fasttrain::cross_entropy_forward", _forward_fake, lib=library)
torch.library.register_fake("fasttrain::cross_entropy_backward", _backward_fake, lib=library)
torch.library.register_fake(
    "fasttrain::cross_entropy_backward_", lambda logits, *options: None, lib=library
)


class Call(NamedTuple):
    """What a call says beside its tensors."""

    terms: tuple[float, float, float, float]
    reduction: str
    wants_entropy: bool
    inplace: bool
    backend: str


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        logits: Tensor,
        targets: Tensor,
        token_weights: Tensor | None,
        num_items: Tensor | float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics = torch.ops.fasttrain.cross_entropy_forward(
            logits, targets, call.terms, call.wants_entropy, call.backend
        )
        coefficients = losses.row_coefficients(
            targets, token_weights, num_items, call.reduction, statistics.dtype
        )
        found = outcome(statistics, targets, losses.unpacked(call.terms), logits.shape[1])
        ctx.save_for_backward(logits, targets, statistics, coefficients)
        ctx.call = call
        ctx.mark_non_differentiable(found.log_probs, found.entropy)
        ctx.set_materialize_grads(False)
        loss = losses.reduced(found.losses, coefficients, call.reduction)
        return loss, found.log_probs, found.entropy

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{NAME} is differentiable once: no create_graph=True")
        if dloss is None:
            return (None,) * 5
        logits, targets, statistics, coefficients = ctx.saved_tensors
        arguments = (targets, statistics, coefficients * dloss, ctx.call.terms, ctx.call.backend)
        if not ctx.call.inplace:
            gradient = torch.ops.fasttrain.cross_entropy_backward(logits, *arguments)
            return None, gradient, None, None, None
        torch.ops.fasttrain.cross_entropy_backward_(logits, *arguments)
        # Whoever needs the logits after this, such as a second backward pass, is told so.
        torch.autograd.graph.increment_version(logits)
        return None, logits.detach(), None, None, None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
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
    inplace: bool = False,
    backend: str = AUTO,
) -> Tensor | LossOutput:
    """Cross-entropy, in nats, of logits (..., V) with labels (...); classes come last.

    As linear_cross_entropy, which see for the other arguments, with the logits given: it reads them
    once forward, and once backward, where it writes their gradient. Every row is computed; an
    ignored one has loss 0 and a gradient of exactly 0.

    inplace: the backward pass writes the gradient over the logits, which nobody may use then; where
    autograd does, it says that they were modified. Logits must be contiguous for that.
    """
    if logits.dim() < 2 or logits.shape[-1] == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{NAME}: labels {tuple(labels.shape)} must have the shape of logits (..., V), V > 0, "
            f"without the last dimension; logits are {tuple(logits.shape)}"
        )
    checks.floating(NAME, logits=logits)
    checks.same_device(NAME, logits=logits, labels=labels, token_weights=token_weights)
    terms = Terms(scale, softcap, label_smoothing, z_loss)
    losses.check_options(NAME, labels, reduction, num_items, terms, token_weights)
    if inplace and not logits.is_contiguous():
        raise ValueError(f"{NAME}: inplace=True takes contiguous logits")
    shape, labels, classes = labels.shape, labels.reshape(-1), logits.shape[-1]
    targets = targets_of(labels, ignore_index, classes)
    losses.check_labels(NAME, labels, None, ignore_index, classes, targets)
    call = Call(losses.packed(terms), reduction, return_entropy, inplace, backend)
    weights = None if token_weights is None else token_weights.reshape(-1)
    loss, log_probs, entropy = _CrossEntropy.apply(
        call, logits.reshape(-1, classes), targets, weights, num_items
    )
    if reduction == "none":
        loss = loss.view(shape)
    return losses.output(
        LossOutput(loss, log_probs.view(shape), entropy.view(shape)),
        return_log_probs,
        return_entropy,
    )
