"""An op that doubles, whose backends are as good and as bad as their names say."""

from typing import NamedTuple

import torch
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import OPS, Candidate
from fasttrain_kernels.settings import AUTO


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    rows: int = 0


def describe(*, device="cpu", dtype=torch.float32, rows=0):
    return Problem(torch.device(device), dtype, rounded(rows))


def make(*backends, isolated=False, providers=()):
    """An op called "toy" with these backends, in this order, then eager."""
    OPS.pop("toy", None)
    candidates = tuple(
        Candidate(name, f"toy_op.{name}", ("cpu",), provider=name in providers, isolated=isolated)
        for name in backends
    )
    return Op("toy", candidates, "toy_op", describe, {})


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend):
        ctx.backend, ctx.problem = backend, describe(rows=x.numel())
        return OPS["toy"].run("forward", ctx.problem, backend, lambda kernel: kernel.forward(x))

    @staticmethod
    def backward(ctx, dy):
        call = lambda kernel: kernel.backward(dy)  # noqa: E731
        return OPS["toy"].run("backward", ctx.problem, ctx.backend, call), None


def double(x, backend=AUTO):
    return _Double.apply(x, backend)
