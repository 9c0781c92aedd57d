"""Optimizers whose step is one pass over memory, for any training loop.

    from fasttrain_kernels.optim import AdamW, decay_groups
    optimizer = AdamW(decay_groups(model, 0.1), lr=3e-4, max_grad_norm=1.0)

One kernel steps all tensors: it unscales, clips, skips what is not finite, steps, rounds and, where
asked to, clears gradients. Parameters of 16 bits are trained with a float32 master, or rounded at
random, or with what rounding lost; moments have 32, 16 or 8 bits. Nothing waits for the device.
"""

from fasttrain_kernels.optim.adamw import AdamW
from fasttrain_kernels.optim.gradient_release import GradientRelease
from fasttrain_kernels.optim.groups import decay_groups
from fasttrain_kernels.optim.lion import Lion
from fasttrain_kernels.optim.muon import Muon
from fasttrain_kernels.optim.muon_groups import hidden_matrices, muon_groups
from fasttrain_kernels.optim.one_pass import OnePassOptimizer
from fasttrain_kernels.optim.sgd import SGD

__all__ = [
    "SGD",
    "AdamW",
    "GradientRelease",
    "Lion",
    "Muon",
    "OnePassOptimizer",
    "decay_groups",
    "hidden_matrices",
    "muon_groups",
]
