"""Checks and shapes that several ops share. A refusal is a ValueError that names both shapes."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def floating(op: str, **tensors: Tensor | None) -> None:
    """Every tensor given holds one of the floating-point types that the ops compute with."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            known = ", ".join(short(dtype) for dtype in FLOATS)
            raise ValueError(f"{op}: {name} is {short(tensor.dtype)}; expected one of {known}")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors given lie on one device."""
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {listed}")


def one_of(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """`value` is one of the words in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name}={value!r}; expected one of {', '.join(allowed)}")


def rows(tensor: Tensor) -> Tensor:
    """`tensor` (..., H) with H > 0 as rows (N, H), each without gaps; a copy only if need be.

    Rows may lie far apart or on top of each other: stride(0) is whatever it was.
    """
    matrix = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return without_gaps(matrix)


def without_gaps(tensor: Tensor) -> Tensor:
    """With elements of the last dimension side by side; a copy only if need be."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
