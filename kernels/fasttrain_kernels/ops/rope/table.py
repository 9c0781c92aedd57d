"""Tables of cosines and sines, and the positions that they are of.

Angles are formed in float64, and what they give is stored in float32: at position 2^20 a product
of two float32 numbers is off by up to 0.03 (half a unit in the last place of 2^20 radians), which
float64 makes 1e-10. A table is made once a batch and read by all layers, so that the time it takes
(as long as one call of rope at 8 heads, on a CPU) is spread over them.
"""

import torch
from torch import Tensor

from fasttrain_kernels.checks import short
from fasttrain_kernels.losses import can_look_at


def rope_table(
    positions: Tensor, inv_freq: Tensor, *, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions x inv_freq, times `scaling`: each (T, R/2) float32.

    positions (T,) of integers, inv_freq (R/2,) in radians a position. scaling: what YaRN calls the
    attention factor. Computed in float64, rounded once.

    Raises ValueError for shapes and dtypes that don't fit.
    """
    _check_integers("positions", positions)
    if inv_freq.dim() != 1 or not inv_freq.is_floating_point():
        raise ValueError(
            f"rope: inv_freq {tuple(inv_freq.shape)} of {short(inv_freq.dtype)} must be (R/2,) of "
            "floating point"
        )
    angles = torch.outer(positions.to(torch.float64), inv_freq.to(torch.float64))
    cos, sin = ((part * scaling).to(torch.float32) for part in (angles.cos(), angles.sin()))
    return cos, sin


def positions_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) positions that begin at 0 in each document; cu_seqlens (docs + 1,) are their borders.

    On the tensor's device, without waiting for it. Empty documents are allowed. Tokens after the
    last border count as one more document. Where borders can be looked at (on a CPU, or under
    `use(checked=True)`), ones that don't rise from 0 to at most T are a ValueError.
    """
    _check_integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("rope: cu_seqlens is empty; expected (documents + 1,), beginning with 0")
    if can_look_at(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last > tokens or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"rope: cu_seqlens must rise from 0 to at most {tokens}, the number of tokens; it "
                f"goes from {first} to {last}"
            )
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return token - cu_seqlens[document]


def frequencies(theta: float, head_dim: int, device: torch.device) -> Tensor:
    """(D/2,) float64: theta^(-2i/D), as RoFormer has it."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return theta**-exponents


def _check_integers(name: str, values: Tensor) -> None:
    if values.dim() != 1 or values.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"rope: {name} {tuple(values.shape)} of {short(values.dtype)} must have one dimension, "
            "of int32 or int64"
        )
