"""What the ops share that make a loss of each row: their arguments, and the way to one number."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels import checks, settings
from fasttrain_kernels.ops.cross_entropy.reference import IGNORED, INVALID, Terms

REDUCTIONS = ("none", "mean", "sum")


class LossOutput(NamedTuple):
    """A loss and, where asked for, what else the same pass has found; without gradients."""

    loss: Tensor  # () or, with reduction "none", the labels' shape
    log_probs: (
        Tensor | None
    )  # the labels' shape: log-probability of each label in nats, 0 if ignored
    entropy: Tensor | None  # the labels' shape: of each row's distribution in nats, 0 if ignored


def check_options(
    op: str,
    labels: Tensor,
    reduction: str,
    num_items: Tensor | float | None,
    terms: Terms,
    token_weights: Tensor | None,
) -> None:
    """ValueError where an argument that these ops share can't be meant."""
    checks.one_of(op, "reduction", reduction, REDUCTIONS)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise ValueError(f"{op}: labels are {checks.short(labels.dtype)}; expected integers")
    if num_items is not None and reduction != "mean":
        raise ValueError(f'{op}: num_items divides a mean; reduction is "{reduction}"')
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"{op}: num_items has {num_items.numel()} elements; expected one number")
    if not 0 <= terms.label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing={terms.label_smoothing}; expected 0 to 1")
    if not terms.z_loss >= 0:
        raise ValueError(f"{op}: z_loss={terms.z_loss}; expected 0 or more")
    if terms.softcap is not None and not 0 < terms.softcap < math.inf:
        raise ValueError(f"{op}: softcap={terms.softcap}; expected a number above 0, or None")
    if token_weights is not None:
        if token_weights.shape != labels.shape:
            raise ValueError(
                f"{op}: token_weights {tuple(token_weights.shape)} must have the shape of labels, "
                f"{tuple(labels.shape)}"
            )
        if token_weights.requires_grad:
            raise ValueError(f"{op}: token_weights want a gradient, and get none; detach them")


def counting_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """The positions (S,) of labels (N,) that are not ignored; None: treat all alike.

    Waits for a GPU once; where that can't be, in a graph that is traced or captured, it is None.
    """
    if torch.compiler.is_compiling():
        return None
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    # As int64: a uint8 would take -100 for 156.
    found = (labels.long() != ignore_index).nonzero()[:, 0]
    return None if found.shape[0] == labels.shape[0] else found


def can_look_at(indices: Tensor) -> bool:
    """Whether values that come with a call are checked: on a CPU, and on a GPU, which has to be
    waited for, if `use(checked=True)` says so; never in a graph that is traced."""
    on_the_cpu = indices.device.type == "cpu"
    return not torch.compiler.is_compiling() and (on_the_cpu or settings.checked())


def check_labels(
    op: str, labels: Tensor, rows: Tensor | None, ignore_index: int, classes: int, targets: Tensor
) -> None:
    """ValueError that names the first label (S,) which is no class, where labels can be looked at.

    rows (S,): their positions; None: they are at 0, 1, 2, ...
    """
    if not can_look_at(labels):
        return
    bad = (targets == INVALID).nonzero()
    if bad.shape[0] > 0:
        place = int(bad[0])
        position = place if rows is None else int(rows[place])
        raise ValueError(
            f"{op}: label {int(labels[place])} at position {position} is none of the {classes} "
            f"classes, and not ignore_index={ignore_index}"
        )


def row_coefficients(
    targets: Tensor,
    token_weights: Tensor | None,
    num_items: Tensor | float | None,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:
    """(S,): what the loss of each row is multiplied by: its weight, for a mean over the divisor.

    0 for an ignored row, NaN for one whose label is no class.
    """
    weights = torch.ones_like(targets, dtype=dtype)
    if token_weights is not None:
        weights = token_weights.to(dtype)
    weights = torch.where(targets >= 0, weights, 0.0)
    weights = torch.where(targets == INVALID, torch.nan, weights)
    if reduction != "mean":
        return weights
    if num_items is None:
        divisor = (targets != IGNORED).sum().to(dtype)
    elif isinstance(num_items, Tensor):
        divisor = num_items.detach().to(device=targets.device, dtype=dtype).reshape(())
    else:
        divisor = torch.full((), float(num_items), dtype=dtype, device=targets.device)
    # Nothing to learn from is a loss of 0, not 0 / 0.
    return weights / torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def reduced(losses: Tensor, coefficients: Tensor, reduction: str) -> Tensor:
    """The losses (S,) times their coefficients, or the sum of that ()."""
    weighted = losses * coefficients
    return weighted if reduction == "none" else weighted.sum(dtype=torch.float64).to(losses.dtype)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor (), multiplied in float32 and rounded once.

    In place where the graph is let go, so that autograd doesn't ask for it again (who keeps what
    saved_tensors_hooks show sees it change); else a copy, which is the caller's to change.
    """
    if factor.device.type != "cpu":
        # A GPU rounds a factor of no dimensions to the gradient's dtype first.
        factor = factor.reshape(1)
    if torch.compiler.is_compiling():
        return (gradient * factor).to(gradient.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return torch.mul(gradient, factor, out=torch.empty_like(gradient))
    if factor.device.type == "cpu" and factor == 1:
        return gradient
    return gradient.mul_(factor)


def spread(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """values (S,) of the rows that count, at their places among `count` zeros."""
    if rows is None:
        return values
    return values.new_zeros(count).index_copy(0, rows, values)


def packed(terms: Terms) -> tuple[float, float, float, float]:
    """Terms as opaque ops take them: numbers only, softcap 0 for none."""
    # Dynamo (2.13) can't hand one float symbol to two autograd functions: a sum is a new symbol.
    return (
        terms.scale + 0.0,
        (terms.softcap or 0.0) + 0.0,
        terms.label_smoothing + 0.0,
        terms.z_loss + 0.0,
    )


def unpacked(terms: Sequence[float]) -> Terms:
    """The inverse."""
    scale, softcap, label_smoothing, z_loss = terms
    return Terms(scale, softcap or None, label_smoothing, z_loss)


def output(found: LossOutput, wants_log_probs: bool, wants_entropy: bool) -> Tensor | LossOutput:
    """The loss alone, or with what was asked for."""
    if not (wants_log_probs or wants_entropy):
        return found.loss
    log_probs = found.log_probs if wants_log_probs else None
    return LossOutput(found.loss, log_probs, found.entropy if wants_entropy else None)
