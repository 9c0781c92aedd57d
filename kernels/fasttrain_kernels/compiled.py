"""PyTorch's own compiler on an op's definition: a backend to compare with, and at times to take.

It compiles for seconds when it is first called, and again for other dtypes, widths and options. The
number of rows may be any; what it makes for any width too takes up to 1.6 times as long on a CPU
(swiglu, 4096 x 1376). Importing a module that uses this costs nothing.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels import launcher

ADVICE = "compiles for seconds before its first use: by name, or where it was timed and is fastest"
# Roundings of 16-bit intermediates are made as they are written. Inductor (2.13) leaves some out:
# the norm of a bfloat16 sum and the sum kept for its gradient then differ, and dx is 9.6 times
# what is allowed.
ROUNDED: dict[str, Any] = {"emulate_precision_casts": True}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called; whole, or that call fails."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with torch.no_grad():
            return _program(function, *map(_fact, arguments))(*_of_any_rows(arguments))

    return call


@functools.cache
def _program(function: Callable[..., Any], *facts: Any) -> Callable[..., Any]:
    """`function` compiled for these dtypes, widths and options alone.

    Dynamo keeps what it has compiled by code object, and gives up after 8 programs of one: each
    combination has a code object of its own.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    own.__defaults__, own.__annotations__ = function.__defaults__, function.__annotations__
    return torch.compile(own, fullgraph=True, options=ROUNDED)


def _fact(argument: Any) -> Any:
    """What of an argument a program is made for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape[1:]
    return tuple(argument) if isinstance(argument, list) else argument


def _of_any_rows(arguments: Sequence[Any]) -> list[Any]:
    """The same memory, whose rows may be of any number and whose widths are fixed; without
    autograd's part in it, a reason to compile anew. One tensor given twice stays one."""
    tensors = {id(a): a.detach() for a in arguments if isinstance(a, Tensor)}
    for tensor in tensors.values():
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
        # Dynamo remembers by line of code that a width has differed, and would make it dynamic.
        torch._dynamo.mark_static(tensor, list(range(1, tensor.dim())))
    return [tensors.get(id(a), a) for a in arguments]


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
