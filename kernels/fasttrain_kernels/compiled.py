"""PyTorch's own compiler on an op's definition: a backend to compare with, and at times to take.

It compiles for seconds when it is first called, and again for other dtypes and options; sizes are
dynamic. Importing a module that uses this costs nothing.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from fasttrain_kernels import launcher

ADVICE = "compiles for seconds before its first use: by name, or where it was timed and is fastest"
# Dtypes, options and sizes of 0 and 1 each need a graph. With fewer allowed an op would fail that
# has served for hours; torch before 2.12 knows no such argument, and allows 8.
LIMIT = {"recompile_limit": 64}
# Roundings of 16-bit intermediates are made as they are written. Inductor (2.13) leaves some out:
# the norm of a bfloat16 sum and the sum kept for its gradient then differ, and dx is 9.6 times
# what is allowed.
ROUNDED: dict[str, Any] = {"emulate_precision_casts": True}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called; whole, or that call fails."""

    @functools.cache
    def made() -> Callable[..., Any]:
        known = inspect.signature(torch.compile).parameters
        limit: dict[str, Any] = {name: n for name, n in LIMIT.items() if name in known}
        return torch.compile(function, fullgraph=True, dynamic=True, options=ROUNDED, **limit)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return made()(*arguments)

    return call


def unsupported(problem: Any) -> str | None:
    """The reason why torch.compile can't make code for the problem's device, or None."""
    if problem.device.type == "cuda":
        return launcher.why_not_gpu(problem.device) or launcher.why_not()
    if problem.device.type != "cpu":
        return f"compiles for CPUs and CUDA devices; the tensors are on {problem.device.type}"
    compiler = os.environ.get("CXX", "g++")  # as torch._inductor.config.cpp.cxx has it
    if shutil.which(compiler) is None:
        return f"torch.compile wants a C++ compiler, and there is no {compiler!r}"
    return None


def advice(problem: Any) -> str:
    """Always against, as long as nothing is known of its time."""
    return ADVICE
