"""Orthogonal matrices near given ones, for optimizers: `newton_schulz`."""

import torch
from torch import Tensor

from fasttrain_kernels import checks
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.newton_schulz.reference import QUINTIC, Coefficients, Problem
from fasttrain_kernels.problem import rounded
from fasttrain_kernels.registry import Candidate
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.newton_schulz"
NAME = "newton_schulz"
METHODS = ("direct", "gram")
GRAM_FROM = 2.0  # times as long as it is short


def method_for(short: int, long: int) -> str:
    """What "auto" is for such matrices."""
    return "gram" if long >= GRAM_FROM * short else "direct"


def describe(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    short: int,
    long: int,
    method: str = AUTO,
    rows: int = 0,
) -> Problem:
    """The problem of `rows` matrices of `short` by `long` or `long` by `short` elements."""
    if method == AUTO:
        method = method_for(short, long)
    return Problem(torch.device(device), dtype, method, short, long, rounded(rows))


NEWTON_SCHULZ = Op(
    NAME,
    candidates=(
        Candidate("triton", f"{FOLDER}.triton_kernel", devices=("cuda",)),
        Candidate("cpu", f"{FOLDER}.cpu_kernel", devices=("cpu",)),
    ),
    folder=FOLDER,
    describe=describe,
    example={"short": 1024, "long": 4096},
)


def _check(matrices: Tensor, steps: int, coefficients: Coefficients, method: str) -> None:
    if matrices.dim() not in (2, 3):
        raise ValueError(f"{NAME}: matrices {tuple(matrices.shape)} must be (m, n) or (B, m, n)")
    checks.floating(NAME, matrices=matrices)
    checks.one_of(NAME, "method", method, (AUTO, *METHODS))
    if steps < 1:
        raise ValueError(f"{NAME}: steps={steps}; expected 1 or more")
    if len(coefficients) != 3:
        raise ValueError(f"{NAME}: coefficients={coefficients}; expected three numbers: a, b, c")


@torch.no_grad()
def newton_schulz(
    matrices: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = QUINTIC,
    method: str = AUTO,
    backend: str = AUTO,
) -> Tensor:
    """For each matrix U S V^T roughly U V^T, the orthogonal matrix that is nearest to it.

    matrices (m, n), or (B, m, n) of which each is treated alone -> the same shape and dtype,
    contiguous: with the default coefficients, singular values between 0.68 and 1.21 for those that
    are above 0.002 of the norm. A matrix of zeros gives zeros; NaN stays in its matrix.

    coefficients: a, b, c; a step maps singular values s to a s + b s^3 + c s^5.

    method: the order of products. "direct" steps the matrices themselves; "gram" the products of
    their shorter side, with the same result but for rounding. "auto" takes "gram" where one side
    is at least twice the other.

    backend: "auto", or the name of one that must serve ("triton", "cpu", "eager"); `use()` and
    FASTTRAIN_KERNELS go before it. "triton" keeps float16 between steps, whatever the dtype; the
    others float32 (float64 for float64). Norms are in float32 everywhere.

    Not differentiable: the result has no history, whether or not gradients are being recorded.

    Raises ValueError for shapes, dtypes and options that don't fit, UnsupportedKernel where the
    backend asked for can't serve. Formulas and sources: ops/newton_schulz/reference.py.
    """
    _check(matrices, steps, coefficients, method)
    if matrices.numel() == 0:
        return torch.empty_like(matrices, memory_format=torch.contiguous_format)
    batch = matrices.detach() if matrices.dim() == 3 else matrices.detach()[None]
    short, long = sorted(batch.shape[1:])
    problem = describe(
        device=batch.device,
        dtype=batch.dtype,
        short=short,
        long=long,
        method=method,
        rows=batch.shape[0],
    )
    with torch.autocast(batch.device.type, enabled=False):
        result: Tensor = NEWTON_SCHULZ.run(
            "forward",
            problem,
            backend,
            lambda kernel: kernel.forward(batch, steps, tuple(coefficients), problem.method),
        )
    return result.view(matrices.shape)
