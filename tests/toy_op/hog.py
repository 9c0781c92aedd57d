"""Right, and holds 200 MB at its peak."""

import torch
from toy_op import reference
from toy_op.reference import backward, unsupported

__all__ = ["backward", "forward", "unsupported"]


def forward(x):
    if x.numel() > 7:
        torch.ones(50 * 2**20)
    return reference.forward(x)
