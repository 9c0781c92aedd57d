"""Gated linear units with GELU, from their definition: two activations of swiglu's reference.

The backends are those of swiglu: of every backend there, forward and backward serve here.
"""

from fasttrain_kernels.ops.swiglu.reference import Problem, backward, forward, unsupported

__all__ = ["Problem", "backward", "forward", "unsupported"]
