"""Kernels for training language models: plain functions on tensors, usable without the trainer.

    from fasttrain_kernels import rms_norm
    y = rms_norm(x, weight)

Each op has several backends (C++ for CPUs, Triton for GPUs, and plain PyTorch, the reference); the
best one that can serve is taken. `explain()` says which and why, `use()` says otherwise, `check()`
compares them on this device. `python -m fasttrain_kernels` prints the table. Importing this loads
neither Triton nor the native libraries. Optimizers are in `fasttrain_kernels.optim`.
"""

from fasttrain_kernels.check import Checked, check
from fasttrain_kernels.dispatch import KernelFailure, choose, explain, quarantine, reset
from fasttrain_kernels.layout import DocumentLayout
from fasttrain_kernels.losses import LossOutput
from fasttrain_kernels.ops.cross_entropy.op import cross_entropy
from fasttrain_kernels.ops.embedding.op import embedding
from fasttrain_kernels.ops.geglu.op import geglu
from fasttrain_kernels.ops.grad_norm.op import grad_norm
from fasttrain_kernels.ops.linear_cross_entropy.op import linear_cross_entropy
from fasttrain_kernels.ops.linear_log_probs.op import linear_log_probs
from fasttrain_kernels.ops.newton_schulz.op import newton_schulz
from fasttrain_kernels.ops.optimizer_step.op import optimizer_step
from fasttrain_kernels.ops.packed_attention.op import packed_attention
from fasttrain_kernels.ops.rms_norm.op import rms_norm
from fasttrain_kernels.ops.rope.op import rope
from fasttrain_kernels.ops.rope.table import rope_table
from fasttrain_kernels.ops.swiglu.op import swiglu
from fasttrain_kernels.selection import Choice, Rejection, UnsupportedKernel
from fasttrain_kernels.settings import use

__all__ = [
    "Checked",
    "Choice",
    "DocumentLayout",
    "KernelFailure",
    "LossOutput",
    "Rejection",
    "UnsupportedKernel",
    "check",
    "choose",
    "cross_entropy",
    "embedding",
    "explain",
    "geglu",
    "grad_norm",
    "linear_cross_entropy",
    "linear_log_probs",
    "newton_schulz",
    "optimizer_step",
    "packed_attention",
    "quarantine",
    "reset",
    "rms_norm",
    "rope",
    "rope_table",
    "swiglu",
    "use",
]
