"""Every Triton configuration of cross_entropy becomes machine code, on a machine without a GPU.

As in test_gpu_gate.py: no register spills, shared memory within the architecture's limit, and
enough programs at once to keep memory busy.
"""

import os
from typing import NamedTuple

import pytest
import torch
from fasttrain_kernels.ops.cross_entropy.reference import Terms
from fasttrain_kernels.testing import ARCHITECTURES
from ops.test_gpu_gate import assert_fits

pytest.importorskip("triton")
FUSED = False  # as triton_kernel launches them
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs kernels that are not interpreted"
)

EXTREMES = [80, 120]  # the least registers in use, the least memory
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Form(NamedTuple):
    """What a call asks for."""

    terms: Terms = Terms()
    wants_entropy: bool = False


PLAIN = Form()
FULL = Form(Terms(0.5, 30.0, 0.1, 1e-4), wants_entropy=True)
BETWEEN = {
    "softcap": Form(Terms(softcap=30.0)),
    "softcap and entropy": Form(Terms(softcap=30.0), wants_entropy=True),
    "smoothing": Form(Terms(label_smoothing=0.1)),
    "z_loss": Form(Terms(z_loss=1e-4)),
    "entropy": Form(wants_entropy=True),
}
FORMS = pytest.mark.parametrize("form", [PLAIN, FULL], ids=["plain", "full"])


def _scalars(scalars):
    return {name: None if value is None else "fp32" for name, value in scalars.items()}


def forward(v, dtype, form):
    from fasttrain_kernels.ops.cross_entropy import triton_kernel

    block, warps = triton_kernel.block_shape(v, dtype.itemsize)
    arguments = {
        "logits_ptr": POINTERS[dtype],
        "targets_ptr": "*i64",
        "statistics_ptr": "*fp32",
        "v": "i32" if v > 1 else 1,
        "first": "i32",
        "logits_stride": "i32" if v > 1 else 1,
        "statistics_stride": "i32",
        **_scalars(triton_kernel._logit_scalars(form.terms)),
        "WANTS_TOTAL": form.terms.label_smoothing > 0,
        "WANTS_ENTROPY": form.wants_entropy,
        "BLOCK": block,
    }
    return triton_kernel.forward_kernel, arguments, warps


def backward(v, dtype, form, out_dtype=None):
    from fasttrain_kernels.ops.cross_entropy import triton_kernel

    block, warps = triton_kernel.block_shape(v, dtype.itemsize)
    arguments = {
        "logits_ptr": POINTERS[dtype],
        "targets_ptr": "*i64",
        "statistics_ptr": "*fp32",
        "coefficients_ptr": "*fp32",
        "out_ptr": POINTERS[out_dtype or dtype],
        "v": "i32" if v > 1 else 1,
        "first": "i32",
        "logits_stride": "i32" if v > 1 else 1,
        "statistics_stride": "i32",
        "out_stride": "i32" if v > 1 else 1,
        **_scalars(triton_kernel._gradient_scalars(form.terms, v)),
        "BLOCK": block,
    }
    return triton_kernel.backward_kernel, arguments, warps


def forward_backward(v, dtype, form):
    from fasttrain_kernels.ops.cross_entropy import triton_kernel

    logits = torch.empty(1, v, dtype=dtype, device="meta")
    block, warps, held = triton_kernel.whole_shape(logits, form.terms)
    arguments = {
        "logits_ptr": POINTERS[dtype],
        "targets_ptr": "*i64",
        "statistics_ptr": "*fp32",
        "coefficients_ptr": "*fp32",
        "v": "i32" if v > 1 else 1,
        "logits_stride": "i32" if v > 1 else 1,
        "statistics_stride": "i32",
        **_scalars(triton_kernel._gradient_scalars(form.terms, v)),
        "WANTS_ENTROPY": form.wants_entropy,
        "HELD": held,
        "BLOCK": block,
    }
    return triton_kernel.forward_backward_kernel, arguments, warps


def assert_all_fit(v, dtype, form, architecture):
    round_sizes = v % 16 == 0
    for kernel in (forward, backward, forward_backward):
        options = {"round_sizes": round_sizes, "fp_fusion": FUSED}
        assert_fits(*kernel(v, dtype, form), architecture, **options)


@FORMS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("v", [32000, 151936])
def test_on_every_architecture(v, architecture, form):
    assert_all_fit(v, torch.bfloat16, form, architecture)


@FORMS
@pytest.mark.parametrize("architecture", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("v", [8192, 32000, 248320])
def test_in_every_dtype(v, dtype, architecture, form):
    assert_all_fit(v, dtype, form, architecture)


@pytest.mark.parametrize("form", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("v", [32000, 151936])
def test_with_some_options(v, form):
    """On the architecture that takes the most registers for the plain and the full form."""
    assert_all_fit(v, torch.bfloat16, form, 120)


# Rows of one block take fewer registers than longer ones: on the architecture that takes the most.
ODD_SIZES = [(v, 120) for v in (1, 2, 1000, 8191)]
ODD_SIZES += [(v, each) for v in (50257, 151937) for each in EXTREMES]


@FORMS
@pytest.mark.parametrize(("v", "architecture"), ODD_SIZES)
def test_of_odd_sizes(v, architecture, form):
    """Where no load is known to be aligned, each element has an address and a mask of its own."""
    assert_all_fit(v, torch.bfloat16, form, architecture)
    if v > 50000:
        assert_all_fit(v, torch.float32, form, architecture)


@FORMS
@pytest.mark.parametrize("architecture", EXTREMES)
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_into_another_dtype(dtypes, architecture, form):
    form_of_kernel = backward(151936, dtypes[0], form, dtypes[1])
    assert_fits(*form_of_kernel, architecture, fp_fusion=FUSED)
