"""The Triton configurations of packed_attention become machine code, on a machine without a GPU.

No register spills, shared memory within the architecture's limit, and matrix units in use. A kernel
takes two to five seconds to compile: hence the ones with every option, which need most.
"""

import os

import pytest
import torch
from fasttrain_kernels.testing import SHARED_MEMORY, compile_for_gpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs kernels that are not interpreted"
)

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
PLAIN = {"cap": None, "window": None, "sinks_ptr": None, "dsinks_ptr": None}
EVERYTHING = {"cap": "fp32", "window": "i32", "sinks_ptr": "*fp32", "dsinks_ptr": "*fp32"}
FORWARD, QUERIES, KEYS = range(3)


def form(which, architecture, width, dtype, options):
    """A kernel, its arguments and its blocks, as triton_kernel launches it."""
    from fasttrain_kernels.ops.packed_attention import triton_kernel

    kernel = (
        triton_kernel.forward_kernel,
        triton_kernel.queries_kernel,
        triton_kernel.keys_kernel,
    )[which]
    blocks = triton_kernel.configuration(divmod(architecture, 10), width, dtype)[which]
    given = {
        **{name: POINTERS[dtype] for name in kernel.arg_names if name.endswith("_ptr")},
        **dict.fromkeys(kernel.arg_names[kernel.arg_names.index("tokens") :], "i32"),
        **dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32"),
        "tiles_ptr": "*i32",
        "scale": "fp32",
        "factor": "fp32",
        **options,
        "HEADS": 32 if which != KEYS else 8,
        "GROUP": 4,
        "CAUSAL": True,
        "WIDTH": width,
        "BLOCK_WIDTH": max(16, 1 << (width - 1).bit_length()),
        "QUERIES": blocks.queries,
        "KEYS": blocks.keys,
    }
    return kernel, {name: given[name] for name in kernel.arg_names}, blocks


def assert_fits(which, architecture, width, dtype=torch.bfloat16, options=EVERYTHING):
    kernel, arguments, blocks = form(which, architecture, width, dtype, options)
    found = compile_for_gpu(
        kernel, arguments, architecture, warps=blocks.warps, stages=blocks.stages
    )
    assert found.stack == 0, found
    assert found.shared <= SHARED_MEMORY[architecture], found
    if dtype != torch.float32 and (which, width) != (KEYS, 256):
        # There, 64 keys, the least that Hopper's units take, would spill.
        assert MATRIX_UNITS[architecture] in found.ptx


@pytest.mark.parametrize("which", [FORWARD, QUERIES, KEYS], ids=["forward", "dq", "dkdv"])
@pytest.mark.parametrize(("architecture", "width"), [(90, 128), (90, 256), (120, 128), (120, 256)])
def test_with_every_option(which, architecture, width):
    assert_fits(which, architecture, width)


@pytest.mark.parametrize(("which", "architecture"), [(FORWARD, 120), (KEYS, 90), (KEYS, 120)])
def test_of_narrow_heads(which, architecture):
    """The kernels that need the most registers."""
    assert_fits(which, architecture, 64)


def test_on_blackwell():
    assert_fits(KEYS, 100, 128)


def test_without_options_of_a_padded_width():
    assert_fits(KEYS, 90, 80, options=PLAIN)


def test_in_float32():
    assert_fits(QUERIES, 80, 128, torch.float32, PLAIN)


@pytest.mark.parametrize("which", [FORWARD, QUERIES, KEYS], ids=["forward", "dq", "dkdv"])
def test_in_float32_of_the_widest(which):
    """Where there is the least shared memory: 99 KB."""
    assert_fits(which, 120, 256, torch.float32)
