"""The fused head on a CPU: products by torch's BLAS, rows by C++.

Products are always of float32: bfloat16 ones take 3 to 10 times as long on CPUs without AMX. So
bfloat16 operands are widened, a panel at a time, and only the gradients are rounded.
"""

from functools import partial

from fasttrain_kernels import native
from fasttrain_kernels.ops.cross_entropy import cpu_kernel as rows
from fasttrain_kernels.ops.linear_cross_entropy import by_panels, by_rows
from fasttrain_kernels.ops.linear_cross_entropy.products import Backend
from fasttrain_kernels.ops.linear_cross_entropy.reference import Problem

BACKEND = Backend(
    kernel=rows,
    narrow_products=False,
    efficient_rows=224,  # 512 would take 7 % less time, and twice the memory
    chunk_bytes=lambda device: 2**30,
    panel_bytes=lambda device: 2**23,  # so that a panel is in the cache when its rows are worked on
)

forward = partial(by_rows.forward, BACKEND)
backward = partial(by_panels.backward, BACKEND)


def unsupported(problem: Problem) -> str | None:
    """The reason why this backend can't serve `problem`, or None."""
    if problem.device.type != "cpu":
        return f"runs on CPUs; the tensors are on {problem.device.type}"
    return native.why_not("_C_cpu")
