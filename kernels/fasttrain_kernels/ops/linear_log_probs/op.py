"""`linear_log_probs`: log-probabilities of labels under logits that never all exist."""

from itertools import pairwise

from torch import Tensor

from fasttrain_kernels import checks, losses
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.cross_entropy.reference import Terms
from fasttrain_kernels.ops.linear_cross_entropy.op import CANDIDATES, describe, fused
from fasttrain_kernels.ops.linear_log_probs.reference import document_sums
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.linear_log_probs"
NAME = "linear_log_probs"

LINEAR_LOG_PROBS = Op(
    NAME,
    candidates=CANDIDATES,
    folder=FOLDER,
    describe=describe,
    example={"classes": 32000, "width": 4096},
)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Log-probability, in nats, of each label, or its sum over each document.

    hidden (..., H), weight (V, H), labels (...) -> the shape of labels, 0 where ignored. With
    cu_seqlens (D + 1,) int32 or int64, where each document of the flattened positions begins and,
    last, where they end -> (D,). float32 (float64 for float64). Differentiable once. Bounds that
    don't rise within the positions are a ValueError wherever labels are looked at.

    What preference losses are made of: the logits are made twice, so no gradient has to be known
    before the loss. The other arguments, what raises, and what a label that is no class does: as
    linear_cross_entropy.
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
        reduction="none",
        num_items=None,
        terms=Terms(scale, softcap),
        token_weights=None,
        wants_entropy=False,
        recompute=None,
        backend=backend,
    )
    log_probs = -found.loss
    if cu_seqlens is None:
        return log_probs
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"{NAME}: cu_seqlens {tuple(cu_seqlens.shape)} of {checks.short(cu_seqlens.dtype)} "
            "must be (documents + 1,) integers"
        )
    checks.same_device(NAME, labels=labels, cu_seqlens=cu_seqlens)
    _check_documents(cu_seqlens, labels.numel())
    return document_sums(log_probs.reshape(-1), cu_seqlens)


def _check_documents(cu_seqlens: Tensor, count: int) -> None:
    """ValueError for bounds that don't rise within the positions, where values can be looked at."""
    if not losses.can_look_at(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    for at, (begin, end) in enumerate(pairwise([0, *bounds, count])):
        if begin > end:
            named = f"entry {at} is {end}" if at < len(bounds) else f"entry {at - 1} is {begin}"
            raise ValueError(
                f"{NAME}: cu_seqlens must rise from 0 or more to at most the {count} positions; "
                f"{named}"
            )
