"""Whether the tensors given to the fused head fit each other, and what it multiplies in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain_kernels import checks


def check_shapes(
    op: str, factors: Sequence[Tensor], bias: Tensor | None, labels: Tensor, rows: Tensor | None
) -> None:
    """ValueError where the tensors don't fit each other."""
    hidden, weight = factors[:2]
    named = {"hidden": hidden, "weight": weight}
    if len(factors) == 4:
        named |= {"adapter's inner": factors[2], "adapter's outer": factors[3]}
    names = list(named)
    for left, right in zip(names[0::2], names[1::2], strict=True):
        one, other = named[left], named[right]
        fits = one.dim() > 1 and other.dim() == 2 and one.shape[-1] == other.shape[1] > 0
        if not fits or other.shape[0] != weight.shape[0] or weight.shape[0] == 0:
            raise ValueError(
                f"{op}: {right} {tuple(other.shape)} must be (V, K) for {left} (..., K) with V, K "
                f"> 0; {left} is {tuple(one.shape)}, weight {tuple(weight.shape)}"
            )
        if one.shape[:-1] != labels.shape:
            raise ValueError(
                f"{op}: labels {tuple(labels.shape)} must have the shape of {left} without its "
                f"last dimension; {left} is {tuple(one.shape)}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias {tuple(bias.shape)} must be ({weight.shape[0]},)")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(
            f"{op}: rows {tuple(rows.shape)} of {checks.short(rows.dtype)} must be (S,) of int64"
        )
    checks.floating(op, **named, bias=bias)
    checks.same_device(op, **named, bias=bias, labels=labels, rows=rows)


def product_dtype(op: str, factors: Sequence[Tensor], bias: Tensor | None) -> torch.dtype:
    """The dtype of the products' operands: the tensors' own, or autocast's, as F.linear has it."""
    found = {tensor.dtype for tensor in (*factors, bias) if tensor is not None}
    device = factors[0].device.type
    knows_autocast = torch.amp.is_autocast_available(device)  # the meta device doesn't
    if knows_autocast and torch.is_autocast_enabled(device) and torch.float64 not in found:
        return torch.get_autocast_dtype(device)
    if len(found) > 1:
        listed = ", ".join(sorted(map(checks.short, found)))
        raise ValueError(f"{op}: tensors of several dtypes ({listed}); cast them, or use autocast")
    return factors[0].dtype
