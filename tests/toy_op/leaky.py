"""Right, and keeps 20 MB of each call."""

import torch
from toy_op import reference
from toy_op.reference import backward, unsupported

__all__ = ["backward", "forward", "unsupported"]
kept = []


def forward(x):
    if x.numel() > 7:
        kept.append(torch.ones(5 * 2**20))
    return reference.forward(x)
