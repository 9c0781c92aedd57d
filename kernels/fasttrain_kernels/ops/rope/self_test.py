"""Small fixed problems on which a backend of rope is compared with exact values."""

from types import ModuleType

import torch

from fasttrain_kernels.ops.rope.reference import Problem
from fasttrain_kernels.ops.rope.table import frequencies, rope_table
from fasttrain_kernels.testing_rope import Norm, rope_expected

EPS = 1e-6
# Tokens, query heads, key heads, D, R: whole vectors and blocks; odd sizes, and a rest.
SHAPES = ((1, 4, 2, 64, 64), (3, 5, 5, 83, 38))
DTYPES = (torch.float32, torch.bfloat16)
# Style, and the norm's: few, since Triton compiles each.
FORMS = (("half", None), ("half", "llama"), ("interleaved", None), ("interleaved", "gemma"))


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error of forward and backward in units of what is allowed: right is at most 1.

    Covers what `kernel` serves of these dtypes, shapes and forms.
    """
    worst = 0.0
    for dtype in DTYPES:
        for shape in SHAPES:
            for style, norm_style in FORMS:
                problem = Problem(device, dtype, shape[3], style, norm_style)
                if kernel.unsupported(problem) is None:
                    found = _one(kernel, device, dtype, shape, style, norm_style, truncating)
                    worst = max(worst, found)
    return worst


def _one(
    kernel: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    style: str,
    norm_style: str | None,
    truncating: bool,
) -> float:
    tokens, q_heads, k_heads, head_dim, rotary = shape
    generator = torch.Generator().manual_seed(head_dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    positions = torch.arange(tokens, device=device) * 1000
    cos, sin = rope_table(positions, frequencies(1e4, rotary, device))
    xs, grads = (
        [normal(tokens, heads, head_dim) for heads in (q_heads, k_heads)] for _ in range(2)
    )
    weights = [None if norm_style is None else normal(head_dim) for _ in range(2)]
    rest = (EPS, norm_style or "llama", style)
    ys = kernel.forward(*xs, cos, sin, *weights, *rest)
    saved = xs if norm_style is not None else (None, None)
    needs = [True, True, norm_style is not None, norm_style is not None]
    results = kernel.backward(*grads, *saved, cos, sin, *weights, *rest, needs)
    worst = 0.0
    for side, weight in enumerate(weights):
        norm = None if weight is None else Norm(weight, EPS, rest[1])
        expected = rope_expected(xs[side], cos, sin, style, grads[side], norm, truncating)
        found = {"y": ys[side], "dx": results[side], "dweight": results[2 + side]}
        worst = max(worst, *(expected[name].ratio(found[name]) for name in expected))
    return worst
