"""What the attention kernels of others have in common: what FlashAttention's serve, and what they
ask about the documents."""

import torch
from torch import Tensor

from fasttrain_kernels import launcher
from fasttrain_kernels.checks import short
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask, Problem

MAX_WIDTH = 256


def flash_why_not(problem: Problem) -> str | None:
    """The reason why no FlashAttention kernel can serve `problem`, options aside, or None."""
    if (reason := launcher.why_not_gpu(problem.device)) is not None:
        return reason
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"serves float16 and bfloat16, not {short(problem.dtype)}"
    if problem.value_dim != problem.head_dim:
        return values_differ(problem)
    if problem.head_dim > MAX_WIDTH or problem.head_dim % 8 != 0:
        return (
            f"serves heads of up to {MAX_WIDTH} elements, in steps of 8; these have "
            f"{problem.head_dim}"
        )
    return None


def flash_varies(problem: Problem) -> str | None:
    """Why FlashAttention's kernels may give other bits from call to call, or None."""
    if problem.device.type != "cuda":
        return None
    return "its backward pass adds up dq with atomics, in whatever order they come"


def values_differ(problem: Problem) -> str:
    """The reason of a kernel that wants keys and values of one width."""
    return (
        f"wants values as wide as keys; these have {problem.value_dim} and "
        f"{problem.head_dim} elements"
    )


def unserved(problem: Problem, *options: str) -> str | None:
    """The reason of a kernel that has none of `options`, names of flags of a problem; or None."""
    asked = [name for name in options if getattr(problem, name)]
    return f"has no {' and no '.join(asked)}" if asked else None


def positive_scale(q: Tensor, mask: Mask) -> tuple[Tensor, Mask, int]:
    """q and the mask of the same scores with a positive scale, and what dq is to be multiplied by.

    These kernels hide a score by -infinity before they scale it, and scale the largest instead of
    looking for it: a scale of 0 gives them NaN, a negative one +infinity.
    """
    if mask.scale > 0:
        return q, mask, 1
    sign = -1 if mask.scale < 0 else 0
    return q * sign, mask._replace(scale=abs(mask.scale) or 1.0), sign


def longest(documents: Documents) -> int:
    """The length of the longest document, as the host knows it."""
    return int(documents.offsets.diff().max())


def flash_window(mask: Mask) -> tuple[int, int]:
    """How many keys a query sees to its left and to its right, beside its own; -1: all."""
    reach = -1 if mask.window is None else mask.window - 1
    return reach, 0 if mask.causal else reach
