"""`geglu`: the product in a gated linear unit whose gate goes through GELU."""

from torch import Tensor

from fasttrain_kernels import checks
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.swiglu.glu import CANDIDATES, describe, glu
from fasttrain_kernels.settings import AUTO

FOLDER = "fasttrain_kernels.ops.geglu"
ACTIVATION = {"tanh": "gelu_tanh", "none": "gelu"}

GEGLU = Op(
    "geglu",
    candidates=CANDIDATES,
    folder=FOLDER,
    describe=describe,
    example={"activation": "gelu_tanh", "width": 14336},
)


def geglu(
    gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh", backend: str = AUTO
) -> Tensor:
    """gelu(gate) * up, float32 inside and rounded once.

    approximate: as F.gelu has it, "tanh" (Gemma) or "none", by the error function. The tensors, the
    backends and what raises: as swiglu.
    """
    checks.one_of("geglu", "approximate", approximate, tuple(ACTIVATION))
    return glu("geglu", gate, up, ACTIVATION[approximate], backend)
