"""The Triton kernels of embedding become machine code, on a machine without a GPU.

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


def forward(width, element):
    from fasttrain_kernels.ops.embedding import triton_kernel

    arguments = {
        "ids_ptr": "*i64",
        "weight_ptr": element,
        "y_ptr": element,
        "rows": "i32",
        "width": "i32",
        "weight_stride": "i32",
        "BLOCK": triton_kernel.block_width(width, triton_kernel.MOST_FORWARD),
    }
    return triton_kernel.forward_kernel, arguments


def backward(width, element):
    """Both kernels."""
    from fasttrain_kernels.ops.embedding import triton_kernel

    pointers = {"owners_ptr": "*i32", "dweight_ptr": element, "partial_ptr": "*fp32"}
    sizes = {"tokens": "i32", "rows": "i32", "width": "i32"}
    block = triton_kernel.block_width(width, triton_kernel.MOST_BACKWARD)
    add = pointers | sizes | {"CHUNK": triton_kernel.CHUNK, "BLOCK": block}
    pieces = add | {"dy_ptr": element, "tokens_ptr": "*i64", "dy_stride": "i32"}
    return [
        (kernel, {name: arguments[name] for name in kernel.arg_names})
        for kernel, arguments in (
            (triton_kernel.sum_pieces_kernel, pieces),
            (triton_kernel.add_pieces_kernel, add),
        )
    ]


@pytest.mark.parametrize(
    ("width", "element", "architecture"),
    [(4096, "*bf16", 80), (4096, "*fp32", 120), (1000, "*bf16", 90)],
)
def test_embedding_fits(width, element, architecture):
    from fasttrain_kernels.ops.embedding.triton_kernel import WARPS

    for kernel, arguments in (forward(width, element), *backward(width, element)):
        assert_fits(kernel, arguments, WARPS, architecture, round_sizes=width % 16 == 0)
