"""Calls of swiglu and geglu that their tests make: inputs, exact values, comparisons of bits."""

from functools import partial
from types import SimpleNamespace

import torch
from fasttrain_kernels import dispatch, geglu, swiglu
from fasttrain_kernels.testing_glu import glu_expected
from ops.rms_norm_calls import BF16, CPU, F32, F64, same_bits

__all__ = ["BF16", "CPU", "F32", "F64", "same_bits"]

GLU = {
    "silu": swiglu,
    "gelu_tanh": geglu,
    "gelu": partial(geglu, approximate="none"),
}
LAYOUTS = ("whole", "halves", "packed")


def on(backend):
    """A place on the CPU, for tests that choose their backend."""
    return SimpleNamespace(backend=backend, device="cpu", truncating=False)


def kernel_of(backend, activation="silu"):
    """The module that implements a backend; that of geglu is another for the reference only."""
    op = "swiglu" if activation == "silu" else "geglu"
    return dispatch.OPS[op].candidate(backend).load()


def inputs(shape, dtype=F32, device="cpu", seed=0, spread=4.0):
    """gate, up and dy from one seed; gates reach far into both tails."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, dy = (torch.randn(shape, generator=generator) for _ in range(3))
    return tuple(tensor.to(device, dtype) for tensor in (gate * spread, up, dy))


def call(place, activation, gate, up, dy, layout="whole"):
    """y, dgate and dup of one call, with gate and up as they are or side by side in one tensor."""
    glu = partial(GLU[activation], backend=place.backend)
    if layout == "whole":
        leaves = [tensor.detach().requires_grad_() for tensor in (gate, up)]
        y = glu(*leaves)
    else:
        leaves = [torch.cat([gate, up], -1).detach().requires_grad_()]
        y = glu(*leaves[0].chunk(2, -1)) if layout == "halves" else glu(leaves[0])
    assert y.shape == gate.shape and y.dtype == gate.dtype and y.is_contiguous()
    gradients = torch.autograd.grad(y, leaves, dy)
    assert all(gradient.dtype == gate.dtype for gradient in gradients)
    dgate, dup = gradients if layout == "whole" else gradients[0].chunk(2, -1)
    return y.detach(), dgate, dup


def assert_exact(place, activation, gate, up, dy, layout="whole"):
    """Forward and both gradients of one call are within what their roundings allow."""
    found = dict(
        zip(("y", "dgate", "dup"), call(place, activation, gate, up, dy, layout), strict=True)
    )
    expected = glu_expected(gate, up, activation, dy, truncating=place.truncating)
    ratios = {name: expected[name].ratio(found[name]) for name in found}
    assert max(ratios.values()) <= 1, ratios
