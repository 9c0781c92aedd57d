"""The Triton configurations of newton_schulz become machine code, on a machine without a GPU.

No register spills, shared memory within the architecture's limit, and matrix units in use.
"""

import os

import pytest
from fasttrain_kernels.testing import SHARED_MEMORY, compile_for_gpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs kernels that are not interpreted"
)

MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


def assert_fits(architecture, rows, inner=4096, *, tall=False, plus="*fp16", **sizes):
    """For products of that many rows, as triton_kernel launches them."""
    from fasttrain_kernels.ops.newton_schulz import triton_kernel

    kernel = triton_kernel.symmetric_kernel
    blocks = triton_kernel.blocks_for(divmod(architecture, 10), rows, inner)
    given = dict.fromkeys(kernel.arg_names, "i32")
    given |= {"left_ptr": "*fp16", "right_ptr": "*fp16", "out_ptr": "*fp16", "plus_ptr": plus}
    given |= dict.fromkeys(("scale", "times", "diagonal"), "fp32")
    # Elements of a row lie side by side, or of a column where a matrix is transposed.
    given |= dict.fromkeys(("left_row", "right_row") if tall else ("left_k", "right_k"), 1)
    given |= {"BLOCK": blocks.tile, "DEPTH": blocks.depth}
    found = compile_for_gpu(
        kernel,
        given | sizes,
        architecture,
        warps=blocks.warps,
        stages=blocks.stages,
        round_sizes=rows % 16 == 0,
    )
    assert found.stack == 0, found
    assert found.shared <= SHARED_MEMORY[architecture], found
    assert MATRIX_UNITS[architecture] in found.ptx


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_of_large_matrices(architecture):
    assert_fits(architecture, 4096)


def test_of_smaller_ones():
    assert_fits(90, 512)


def test_of_tall_ones():
    """The form that needs the most registers."""
    assert_fits(120, 4096, tall=True, plus=None)


def test_of_odd_sizes():
    """Where no load is known to be aligned, each element has an address and a mask of its own."""
    assert_fits(120, 4095, 4095)


def test_of_matrices_that_are_two_to_the_31_elements_apart():
    assert_fits(90, 4096, left_batch="i64", right_batch="i64")
