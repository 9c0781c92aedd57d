"""What choices follow from: a problem is a NamedTuple of facts of a call, its device first.

It holds no data. Sizes that vary from call to call are rounded, so that few problems stand for all
calls; such as `rows`, by which times may differ but nothing else.
"""

from __future__ import annotations

from typing import Any

import torch

from fasttrain_kernels.checks import short


def rounded(count: int) -> int:
    """Up to a power of two; 0 stays 0, which stands for "not known"."""
    return 0 if count <= 0 else 1 << (count - 1).bit_length()


def form(problem: Any) -> tuple[str, ...]:
    """What a self-test has to cover of a problem: dtypes and names, not sizes and not flags."""
    kinds = (torch.dtype, str, type(None))
    return tuple(str(value) for value in problem[1:] if isinstance(value, kinds))


def text(problem: Any, *, without: tuple[str, ...] = ()) -> str:
    """The problem in one line, as records are kept by; its device goes without saying."""
    facts = problem._asdict().items()
    return ", ".join(_fact(*fact) for fact in facts if fact[0] not in ("device", *without))


def _fact(name: str, value: Any) -> str:
    return f"{name}={short(value) if isinstance(value, torch.dtype) else value}"
