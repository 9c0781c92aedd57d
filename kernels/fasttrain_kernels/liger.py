"""liger-kernel, whose Triton kernels stand behind ours where it is installed.

They are asked below their autograd functions, so that what is saved is what all backends save. They
overwrite what they are given (gradients, and in the backward pass inputs): they get copies.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from fasttrain_kernels import launcher
from fasttrain_kernels.checks import short

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 65536  # elements of a row, which its kernels hold in one block


def why_not(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    module: str,
    functions: dict[str, tuple[str, ...]],
) -> str | None:
    """The reason why functions of liger_kernel.ops.<module> can't run on rows of `width` elements,
    or None; each function with the names that its first parameters are known by."""
    if (reason := launcher.why_not_gpu(device) or launcher.why_not()) is not None:
        return reason
    if dtype not in DTYPES:
        return f"serves {', '.join(map(short, DTYPES))}, not {short(dtype)}"
    if width > MAX_WIDTH:
        return f"serves rows of up to {MAX_WIDTH} elements; these have {width}"
    try:
        for name, expected in functions.items():
            found = tuple(inspect.signature(get(module, name)).parameters)
            if found[: len(expected)] != expected:
                return f"this version's {name} takes ({', '.join(found)}), which isn't known here"
    except ImportError:
        return "liger-kernel is not installed"
    except AttributeError as error:
        return f"this version is not known here: {error}"
    return None


def get(module: str, name: str) -> Any:
    """Of liger_kernel.ops.<module>."""
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
