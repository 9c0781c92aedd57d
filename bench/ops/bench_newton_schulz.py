"""newton_schulz against a loop over matrices, as torch.optim.Muon makes it, in its bfloat16 and in
float32; and against the same products for all matrices at once.

A case's FLOPs count one triangle of what is symmetric, in the form that "auto" takes; five steps.
"""

from typing import NamedTuple

import pytest
import torch
from fasttrain_kernels import newton_schulz
from fasttrain_kernels.ops.newton_schulz.op import method_for
from fasttrain_kernels.ops.newton_schulz.reference import QUINTIC
from fasttrain_kernels.ops.newton_schulz.workload import one_by_one

from bench.harness import H200_MATMUL, Absent, Case, Provider

F32, BF16 = torch.float32, torch.bfloat16
EXPECTED_SHARE = 0.65  # of the matmul ceiling: symmetric products are below it, others near it


class Shape(NamedTuple):
    """Matrices of a model that have one shape."""

    count: int
    rows: int
    columns: int

    @property
    def flops(self):
        """forms.py has the formulas."""
        short, long = sorted((self.rows, self.columns))
        ratio = long / short
        units = 6 * ratio + 14 if method_for(short, long) == "gram" else 15 * ratio + 5
        return int(self.count * units * short**3)


# bench/train's model: attention, MLP. An 8B model: queries and output, keys and values, MLP.
SHAPES = {
    "cpu": [Shape(8, 512, 512), Shape(8, 1376, 512), Shape(4, 512, 1376), Shape(2, 1024, 2752)],
    "cuda": [Shape(16, 4096, 4096), Shape(16, 1024, 4096), Shape(8, 14336, 4096)],
}
CASES = [(*shape, dtype) for shape in SHAPES["cpu"] + SHAPES["cuda"] for dtype in (F32, BF16)]


def pytest_generate_tests(metafunc):
    from bench.harness import chosen_device

    shapes = SHAPES[chosen_device(metafunc.config)]
    metafunc.parametrize("shape", shapes, ids=["x".join(map(str, shape)) for shape in shapes])


def wide(matrix):
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def at_once(matrices):
    """Plain batched products, of whole matrices."""
    a, b, c = QUINTIC
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    x = x.mT if x.shape[1] > x.shape[2] else x
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_newton_schulz(compare, device, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator).to(device, dtype)

    def loop(kept):
        return [one_by_one(wide(matrix).to(kept)) for matrix in matrices]

    def in_float32():
        if dtype == BF16 and device == "cuda":
            raise Absent("nobody does so on a GPU")
        return lambda: loop(F32)

    compare(
        Case(
            "newton_schulz",
            f"{shape.count} of {shape.rows}x{shape.columns} {str(dtype).removeprefix('torch.')}",
            2 * matrices.numel() * dtype.itemsize,
            flops=shape.flops,
            predicted_seconds=shape.flops / (EXPECTED_SHARE * H200_MATMUL),
        ),
        [
            Provider("fasttrain", lambda: lambda: newton_schulz(matrices)),
            Provider("loop, bfloat16", lambda: lambda: loop(BF16)),
            Provider("loop, float32", in_float32),
            Provider("at once", lambda: lambda: at_once(matrices)),
        ],
        ours="fasttrain",
        baseline="loop, bfloat16",
    )
