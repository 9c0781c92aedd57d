"""Every Triton configuration becomes machine code for every architecture, on a machine without one.

What is asserted: no register spills, shared memory within the architecture's limit, and enough
programs at once to keep memory busy.
"""

import os

import pytest
from fasttrain_kernels.testing import ARCHITECTURES, SHARED_MEMORY, compile_for_gpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs kernels that are not interpreted"
)

WIDTHS = [2**power for power in range(14)]  # 8192 is the widest row; the others pad up to these
# Below 8192 at most 80 of 128 registers are used: every tile on one architecture, and on the others
# the two shapes that use the most, of several rows and of one.
TILES = [(width, 120) for width in WIDTHS]
TILES += [(width, other) for other in ARCHITECTURES if other != 120 for width in (128, 8192)]


def rms_norm_forward(width, element="*bf16", weight=None, residual="*bf16", style="llama"):
    from fasttrain_kernels.ops.rms_norm import triton_kernel

    block_rows, block_width, warps = triton_kernel.block_shape(width)
    arguments = {
        "x_ptr": element,
        "residual_ptr": residual,
        "weight_ptr": weight or element,
        "y_ptr": weight or element,
        "sum_ptr": residual,
        "rstd_ptr": "*fp32",
        "rows": "i32",
        "width": "i32",
        "x_stride": "i32",
        "residual_stride": "i32",
        "eps": "fp32",
        "OFFSET": 1.0 if style == "gemma" else 0.0,
        "CAST_FIRST": style == "llama",
        "BLOCK_ROWS": block_rows,
        "BLOCK_WIDTH": block_width,
    }
    return triton_kernel.forward_kernel, arguments, warps


def rms_norm_backward(width, element="*bf16", weight=None, dsum="*bf16", dx=True, dweight=True):
    from fasttrain_kernels.ops.rms_norm import triton_kernel

    block_rows, block_width, warps = triton_kernel.block_shape(width)
    arguments = {
        "dy_ptr": weight or element,
        "dsum_ptr": dsum,
        "x_ptr": element,
        "weight_ptr": weight or element,
        "rstd_ptr": "*fp32",
        "dx_ptr": element if dx else None,
        "partial_ptr": "*fp32" if dweight else None,
        "rows": "i32",
        "width": "i32",
        "x_stride": "i32",
        "OFFSET": 0.0,
        "BLOCK_ROWS": block_rows,
        "BLOCK_WIDTH": block_width,
    }
    return triton_kernel.backward_kernel, arguments, warps


def assert_fits(kernel, arguments, warps, architecture, **options):
    found = compile_for_gpu(kernel, arguments, architecture, warps=warps, **options)
    assert found.stack == 0, found
    assert found.shared <= SHARED_MEMORY[architecture], found
    assert found.programs_per_multiprocessor(warps) * warps >= 16, found


@pytest.mark.parametrize(("width", "architecture"), TILES)
def test_rms_norm_at_every_width(width, architecture):
    assert_fits(*rms_norm_forward(width), architecture)
    assert_fits(*rms_norm_backward(width), architecture)


@pytest.mark.parametrize("architecture", [80, 120])  # the least registers in use, the least memory
@pytest.mark.parametrize("width", [128, 4096, 8192])
def test_rms_norm_in_every_form(width, architecture):
    for element in ("*fp32", "*bf16", "*fp16"):
        residual = None if element == "*fp16" else element
        assert_fits(*rms_norm_forward(width, element, None, residual, "gemma"), architecture)
        assert_fits(*rms_norm_backward(width, element, None, residual), architecture)
    assert_fits(*rms_norm_forward(width, "*bf16", "*fp32", None), architecture)
    assert_fits(*rms_norm_backward(width, "*bf16", "*fp32", None), architecture)


@pytest.mark.parametrize("width", [128, 8192])
@pytest.mark.parametrize(("dx", "dweight"), [(True, False), (False, True)])
def test_rms_norm_backward_in_part(width, dx, dweight):
    for element in ("*fp32", "*bf16", "*fp16"):
        residual = None if element == "*fp16" else element
        form = rms_norm_backward(width, element, None, residual, dx, dweight)
        assert_fits(*form, 120)


@pytest.mark.parametrize("architecture", [80, 120])
@pytest.mark.parametrize("width", [63, 1000, 4095, 8191])
def test_rms_norm_of_odd_sizes(width, architecture):
    """Where no load is known to be aligned, each element has an address and a mask of its own."""
    assert_fits(*rms_norm_forward(width), architecture, round_sizes=False)
    assert_fits(*rms_norm_backward(width), architecture, round_sizes=False)


@pytest.mark.parametrize("ones", [{"rows": 1}, {"width": 1, "x_stride": 1}], ids=["row", "column"])
def test_rms_norm_of_one_row_or_column(ones):
    width = ones.get("width", 4096)
    for kernel, arguments, warps in (rms_norm_forward(width), rms_norm_backward(width)):
        assert_fits(kernel, arguments | ones, warps, 90)
