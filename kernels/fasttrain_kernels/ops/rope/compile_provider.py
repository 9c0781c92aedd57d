"""The definition of rope, compiled by torch.compile."""

from fasttrain_kernels.compiled import advice, compiled, unsupported
from fasttrain_kernels.ops.rope import reference

forward = compiled(reference.forward)
backward = compiled(reference.backward)

__all__ = ["advice", "backward", "forward", "unsupported"]
