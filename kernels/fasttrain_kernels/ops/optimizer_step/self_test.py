"""Small fixed steps on which a backend of optimizer_step is compared with exact values."""

import math
from types import ModuleType

import torch

from fasttrain_kernels.testing_optimizer import (
    OFFSETS,
    SIZES,
    changed_by_skipping,
    parity_of,
    problems,
    random_step,
)


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error in units of what is allowed: right is at most 1.

    Covers what `kernel` serves of every algorithm, rounding and kind of moments: a step that clips
    and unscales, and one that is skipped, after which not a bit may have changed.
    """
    worst = 0.0
    for problem in problems(kernel, device):
        worst = max(worst, parity_of(kernel, random_step(problem, SIZES, offsets=OFFSETS)))
        if changed_by_skipping(kernel, random_step(problem, SIZES[:2])):
            return math.inf
    return worst
