"""`swiglu`: the product in a gated linear unit whose gate goes through SiLU."""

from torch import Tensor

from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.swiglu.glu import CANDIDATES, FOLDER, describe, glu
from fasttrain_kernels.settings import AUTO

SWIGLU = Op(
    "swiglu",
    candidates=CANDIDATES,
    folder=FOLDER,
    describe=describe,
    example={"width": 14336},
)


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str = AUTO) -> Tensor:
    """silu(gate) * up, float32 inside and rounded once.

    gate, up (..., I) of one shape and dtype -> (..., I), new and contiguous. Without `up`, gate is
    (..., 2I) and holds both, gate first, as one projection makes them (Phi-3); its gradient is
    then one tensor too. Rows may lie apart: the halves of such a tensor are not copied.

    backend: "auto", or the name of one that must serve ("triton", "cpu", "eager"); `use()` and
    FASTTRAIN_KERNELS go before it. Saves its inputs, nothing else. Bitwise repeatable, on any
    number of threads. Differentiable once.

    Raises ValueError for shapes, dtypes or devices that don't fit, UnsupportedKernel where the
    backend asked for can't serve. Formulas and source: ops/swiglu/reference.py.
    """
    return glu("swiglu", gate, up, "silu", backend)
