"""Small fixed problems on which a backend of geglu is compared with exact values."""

from types import ModuleType

import torch

from fasttrain_kernels.ops.geglu.op import ACTIVATION
from fasttrain_kernels.ops.swiglu import self_test


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error in units of what is allowed: right is at most 1. As swiglu's self-test."""
    return self_test.parity(kernel, device, truncating, tuple(ACTIVATION.values()))
