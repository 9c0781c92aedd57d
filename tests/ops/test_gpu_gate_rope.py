"""Every form of rope's Triton kernels becomes machine code, on a machine without a GPU.

As in test_gpu_gate.py: no register spills, shared memory within the architecture's limit, and
enough programs at once to keep memory busy.
"""

import os

import pytest
from ops.test_gpu_gate import assert_fits

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs kernels that are not interpreted"
)

# Query heads, key heads, D, R: an 8B model's; Gemma 3's, wide; a quarter turned; odd; the widest.
LLAMA, GEMMA, PARTIAL, ODD = (32, 8, 128, 128), (8, 4, 256, 256), (32, 8, 128, 32), (5, 3, 83, 38)
WIDEST = (3, 1, 1024, 1000)


def strides(name):
    return {f"{name}_token_stride": "i32", f"{name}_head_stride": "i32"}


def constants(sizes, interleaved, gemma):
    return {"OFFSET": 1.0 if gemma else 0.0, "NEIGHBOURS": interleaved, **sizes}


def forward(shape, element="*bf16", interleaved=False, norm=None, keys=True, back=False):
    from fasttrain_kernels.ops.rope import triton_kernel

    q_heads, k_heads, head_dim, rotary = shape
    sizes, warps = triton_kernel.forward_blocks(
        q_heads, k_heads if keys else 0, head_dim, rotary // 2
    )
    arguments = {
        "q_ptr": element,
        "k_ptr": element if keys else None,
        "q_out_ptr": element,
        "k_out_ptr": element,
        "q_weight_ptr": norm,
        "k_weight_ptr": norm,
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "q_heads": "i32",
        "k_heads": "i32",
        **strides("q"),
        **strides("k"),
        "cos_stride": "i32",
        "sin_stride": "i32",
        "eps": "fp32",
        "DIRECTION": -1.0 if back else 1.0,
        **constants(sizes, interleaved, norm is not None),
    }
    return triton_kernel.forward_kernel, arguments, warps


def norm_backward(shape, element="*bf16", interleaved=False, norm="*fp32", wanted=(True, True)):
    from fasttrain_kernels.ops.rope import triton_kernel

    q_heads, k_heads, head_dim, rotary = shape
    wants_dx, wants_dw = wanted
    sizes, warps = triton_kernel.backward_blocks(q_heads, k_heads, head_dim, rotary // 2)
    arguments = {
        "q_grad_ptr": element,
        "k_grad_ptr": element,
        "q_ptr": element,
        "k_ptr": element,
        "q_weight_ptr": norm,
        "k_weight_ptr": norm,
        "dq_ptr": element if wants_dx else None,
        "dk_ptr": element if wants_dx else None,
        "q_share_ptr": "*fp32" if wants_dw else None,
        "k_share_ptr": "*fp32" if wants_dw else None,
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "tokens": "i32",
        "q_heads": "i32",
        "k_heads": "i32",
        **strides("q_grad"),
        **strides("k_grad"),
        **strides("q"),
        **strides("k"),
        "cos_stride": "i32",
        "sin_stride": "i32",
        "eps": "fp32",
        **constants(sizes, interleaved, gemma=False),
    }
    return triton_kernel.norm_backward_kernel, arguments, warps


BF16, F16, F32 = "*bf16", "*fp16", "*fp32"
# (shape, element, interleaved, norm), and the architecture: each form once, the least registers in
# use (80) and the least memory (120) most often.
FORWARD = [
    (LLAMA, BF16, False, None, 80),
    (LLAMA, BF16, True, None, 90),
    (LLAMA, F16, True, F16, 100),
    (LLAMA, F32, False, F32, 120),
    (GEMMA, BF16, False, BF16, 80),
    (PARTIAL, BF16, False, BF16, 120),
    (ODD, F32, True, None, 80),
    (WIDEST, BF16, False, None, 120),
]
BACKWARD = [
    (LLAMA, BF16, False, F32, 80),
    (LLAMA, BF16, True, BF16, 90),
    (LLAMA, F32, False, F32, 100),
    (LLAMA, F16, True, F16, 120),
    (GEMMA, BF16, False, BF16, 80),
    (PARTIAL, BF16, False, BF16, 120),
    (ODD, F32, False, F32, 80),
    (WIDEST, BF16, True, BF16, 120),
]


@pytest.mark.parametrize(("shape", "element", "interleaved", "norm", "architecture"), FORWARD)
def test_forward(shape, element, interleaved, norm, architecture):
    form = forward(shape, element, interleaved, norm, back=norm is None)
    assert_fits(*form, architecture, round_sizes=shape is not ODD)


@pytest.mark.parametrize(("shape", "element", "interleaved", "norm", "architecture"), BACKWARD)
def test_norm_backward(shape, element, interleaved, norm, architecture):
    form = norm_backward(shape, element, interleaved, norm)
    assert_fits(*form, architecture, round_sizes=shape is not ODD)


def test_one_side_and_only_some_gradients():
    assert_fits(*forward(LLAMA, keys=False), 90)
    assert_fits(*norm_backward(LLAMA, wanted=(False, True)), 90)
    assert_fits(*norm_backward(LLAMA, wanted=(True, False)), 90)
