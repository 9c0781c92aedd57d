"""liger-kernel's SwiGLU.

Its backward pass writes gradients over gate and up, which others may still need: it gets copies.
Its GeGLU isn't here: 1 + tanh loses small values, which are 1e5 times as far off as is allowed.
"""

import torch
from torch import Tensor

from fasttrain_kernels import liger
from fasttrain_kernels.ops.swiglu.reference import Problem

FUNCTIONS = {"swiglu_forward": ("a", "b"), "swiglu_backward": ("a", "b", "dc")}


def unsupported(problem: Problem) -> str | None:
    """The reason why liger-kernel can't serve `problem`, or None."""
    if problem.activation != "silu":
        return f"its {problem.activation} loses small values"
    return liger.why_not(problem.device, problem.dtype, problem.width, "swiglu", FUNCTIONS)


def forward(gate: Tensor, up: Tensor, activation: str, y: Tensor) -> None:
    """As reference.forward."""
    y.copy_(liger.get("swiglu", "swiglu_forward")(gate.contiguous(), up.contiguous())[2])


def backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dgate: Tensor | None,
    dup: Tensor | None,
) -> None:
    """As reference.backward."""
    copies = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (gate, up))
    found = liger.get("swiglu", "swiglu_backward")(*copies, dy.contiguous())
    for target, gradient in zip((dgate, dup), found, strict=True):
        if target is not None:
            target.copy_(gradient)
