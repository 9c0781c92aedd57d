"""Every Triton configuration of swiglu and geglu becomes machine code, on a machine without a GPU.

As in test_gpu_gate.py: no register spills, and enough programs at once to keep memory busy.
"""

import os

import pytest
from fasttrain_kernels.testing import ARCHITECTURES
from ops.test_gpu_gate import assert_fits

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs kernels that are not interpreted"
)


def configuration(kernel, element, activation, wanted=("dgate", "dup"), **sizes):
    """A kernel of "forward" or "backward", its arguments, its warps."""
    from fasttrain_kernels.ops.swiglu import triton_kernel

    names = {"forward": ("gate", "up", "y"), "backward": ("dy", "gate", "up", "dgate", "dup")}
    absent = {"dgate", "dup"} - set(wanted)
    arguments = {f"{n}_ptr": None if n in absent else element for n in names[kernel]}
    arguments |= {"width": "i32"} | {f"{n}_stride": "i32" for n in names[kernel]} | sizes
    arguments |= {"ACTIVATION": activation, "BLOCK": triton_kernel.BLOCK}
    return getattr(triton_kernel, f"{kernel}_kernel"), arguments, triton_kernel.WARPS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_passes(architecture):
    assert_fits(*configuration("backward", "*bf16", "gelu"), architecture)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_every_activation(activation):
    assert_fits(*configuration("forward", "*bf16", activation), 90)


@pytest.mark.parametrize("element", ["*fp32", "*fp16"])
def test_every_dtype(element):
    assert_fits(*configuration("backward", element, "gelu_tanh"), 80)


@pytest.mark.parametrize("wanted", ["dgate", "dup"])
def test_one_gradient(wanted):
    assert_fits(*configuration("backward", "*bf16", "silu", (wanted,)), 80)


def test_odd_sizes():
    """Where no load is known to be aligned, each element has an address and a mask of its own."""
    assert_fits(*configuration("backward", "*bf16", "gelu"), 120, round_sizes=False)


def test_more_than_two_to_the_31_elements():
    assert_fits(*configuration("forward", "*bf16", "silu", width="i64"), 90)
