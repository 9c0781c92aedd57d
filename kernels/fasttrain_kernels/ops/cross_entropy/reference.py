"""Cross-entropy of rows of logits, from its definition, in plain PyTorch; float32 inside.

N rows of V classes. Of a row a with label y:
    z = scale * a, and with a softcap c: z = c * tanh(scale * a / c)
    lse = log(sum_j exp(z_j)),  p_j = exp(z_j - lse)
    log_prob = z_y - lse
    loss = -(1 - s) * log_prob - s / V * sum_j (z_j - lse) + zeta * lse^2
    entropy = lse - sum_j p_j z_j
    dloss/da_j = ((1 + 2 zeta lse) p_j - (1 - s) [j = y] - s / V) * scale * (1 - (z_j / c)^2)
with label smoothing s (Szegedy et al. 2016, arXiv 1512.00567, section 7; as torch has it), z-loss
zeta (Chowdhery et al. 2022, arXiv 2204.02311, section 5), the softcap of Gemma 2 (arXiv 2408.00118,
section 2.2). Without a softcap the last factor is 1.

A backend makes the two passes over the logits, and nothing else: *statistics* of each row, from
which `outcome` makes loss, log_prob and entropy, and the gradient. It sees *targets* instead of
labels: `targets_of` turns what is ignored into IGNORED and what is no class into INVALID. Both
passes can take the columns of a row in several pieces, so that whole rows need never exist.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# What is kept of a row: the columns of a (N, 5) tensor, float32 (float64 for float64 logits).
MAXIMUM = 0  # m = max_j z_j
SUM = 1  # sum_j exp(z_j - m)
LABEL = 2  # z_y; 0 where the target is no class
TOTAL = 3  # sum_j z_j; only with label smoothing
WEIGHTED = 4  # sum_j exp(z_j - m) z_j, where exp is not 0; only where entropy is wanted
FIELDS = 5

IGNORED = -1  # the target of a row that counts for nothing: its gradient is exactly 0
INVALID = -2  # the target of a row whose label is no class: its loss and its gradient are NaN


class Terms(NamedTuple):
    """What is made of a row's logits."""

    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Problem(NamedTuple):
    """The facts that decide which backend can serve a call."""

    device: torch.device
    dtype: torch.dtype
    classes: int
    width: int = 0  # of the hidden states, in a fused head
    rows: int = 0  # a power of two


def unsupported(problem: Problem) -> str | None:
    """The definition serves everything."""
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of exponentials, sums and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def targets_of(labels: Tensor, ignore_index: int, classes: int) -> Tensor:
    """labels (N,) of any integer dtype -> (N,) int64: a class, IGNORED, or INVALID."""
    labels = labels.long()
    valid = (labels >= 0) & (labels < classes)
    found = torch.where(valid, labels, INVALID)
    return torch.where(labels == ignore_index, IGNORED, found)


def forward(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    statistics: Tensor,
    wants_entropy: bool,
    first: int = 0,
) -> None:
    """Write the statistics (N, 5) of columns [first, first + v), which are logits (N, v).

    With first > 0 they are added to what the columns before have left there. Logits may have any
    row stride; within a row they are adjacent. Of TOTAL and WEIGHTED, what is not wanted is 0.
    """
    z = capped(logits, terms)
    maximum = z.amax(1)
    # A row of nothing but -inf has no largest finite value to subtract: exp(-inf - 0) = 0.
    e = torch.exp(z - _finite(maximum)[:, None])
    column = targets - first
    inside = (targets >= 0) & (column >= 0) & (column < logits.shape[1])
    label = z.gather(1, torch.where(inside, column, 0)[:, None])[:, 0]
    zeros = torch.zeros_like(maximum)
    total = z.sum(1) if terms.label_smoothing else zeros
    weighted = torch.where(e == 0, 0.0, e * z).sum(1) if wants_entropy else zeros
    found = torch.stack(
        [maximum, e.sum(1), torch.where(inside, label, 0.0), total, weighted], dim=1
    )
    statistics.copy_(found if first == 0 else merged(statistics, found))


def merged(one: Tensor, other: Tensor) -> Tensor:
    """The statistics (N, 5) of rows whose columns have been counted in two parts."""
    maximum = torch.maximum(one[:, MAXIMUM], other[:, MAXIMUM])
    result = torch.zeros_like(one)
    for part in (one, other):
        # exp(-inf - -inf) is NaN; a part of nothing but -inf has no sums to scale.
        factor = torch.exp(part[:, MAXIMUM] - _finite(maximum))[:, None]
        result += part * torch.cat(
            [torch.zeros_like(factor), factor, *[torch.ones_like(factor)] * 2, factor], 1
        )
    result[:, MAXIMUM] = maximum
    return result


def backward(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    statistics: Tensor,
    coefficients: Tensor,
    out: Tensor,
    first: int,
    classes: int,
) -> None:
    """Write coefficients * dloss/da of columns [first, first + v), out of `classes`, into `out`.

    logits, out (N, v): `out` may be `logits` itself. coefficients (N,), in the statistics' dtype.
    """
    z = capped(logits, terms)
    maximum, total = statistics[:, MAXIMUM, None], statistics[:, SUM, None]
    grad = torch.exp(z - _finite(maximum)) / total
    if terms.z_loss:
        grad = grad * (1 + 2 * terms.z_loss * (maximum + total.log()))
    if terms.label_smoothing:
        grad = grad - terms.label_smoothing / classes
    column = torch.arange(first, first + logits.shape[1], device=logits.device)
    grad = torch.where(column == targets[:, None], grad - (1 - terms.label_smoothing), grad)
    grad = grad * terms.scale
    if terms.softcap is not None:
        grad = grad * (1 - (z / terms.softcap).square())
    grad = grad * coefficients[:, None]
    out.copy_(torch.where(targets[:, None] == IGNORED, 0.0, grad))


def forward_backward(
    logits: Tensor,
    targets: Tensor,
    terms: Terms,
    statistics: Tensor,
    wants_entropy: bool,
    coefficients: Tensor,
) -> None:
    """Both passes over whole rows: the statistics are written, and logits become their gradient."""
    forward(logits, targets, terms, statistics, wants_entropy)
    backward(logits, targets, terms, statistics, coefficients, logits, 0, logits.shape[1])


class Outcome(NamedTuple):
    """Of each row, (N,): what is not of a class is 0 where ignored and NaN where invalid."""

    losses: Tensor
    log_probs: Tensor
    entropy: Tensor


def outcome(statistics: Tensor, targets: Tensor, terms: Terms, classes: int) -> Outcome:
    """Loss, log-probability of the label and entropy, in nats, from the statistics (N, 5)."""
    maximum, total = statistics[:, MAXIMUM], statistics[:, SUM]
    log_sum = total.log()
    # The two large numbers meet first: lse alone would lose the digits that they share.
    log_probs = (statistics[:, LABEL] - maximum) - log_sum
    losses = -log_probs
    if terms.label_smoothing:
        uniform = (maximum - statistics[:, TOTAL] / classes) + log_sum
        losses = (1 - terms.label_smoothing) * losses + terms.label_smoothing * uniform
    if terms.z_loss:
        losses = losses + terms.z_loss * (maximum + log_sum).square()
    entropy = (maximum - statistics[:, WEIGHTED] / total) + log_sum
    filled = torch.where(targets == INVALID, torch.nan, 0.0).to(losses.dtype)
    return Outcome(*(torch.where(targets >= 0, x, filled) for x in (losses, log_probs, entropy)))


def capped(logits: Tensor, terms: Terms) -> Tensor:
    """z (N, v), in the dtype of computation."""
    z = logits.to(compute_dtype(logits.dtype)) * terms.scale
    return z if terms.softcap is None else terms.softcap * torch.tanh(z / terms.softcap)


def _finite(maximum: Tensor) -> Tensor:
    """What is subtracted before exp: the maximum, but 0 for a row of nothing but -inf."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)
