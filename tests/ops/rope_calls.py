"""Calls of rope that its tests make: inputs, comparisons with exact values, and of bits."""

from typing import NamedTuple

import torch
from fasttrain_kernels import dispatch, rope, rope_table
from fasttrain_kernels.ops.rope.table import frequencies
from fasttrain_kernels.testing_rope import Norm, rope_expected
from ops.conftest import Place
from torch import Tensor

EPS = 1e-6
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
STYLES = ("half", "interleaved")
CPU = Place("cpu", "cpu")


class Inputs(NamedTuple):
    """What is turned, as leaves that want gradients, and the table."""

    q: Tensor
    k: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    table: tuple[Tensor, Tensor]

    @property
    def leaves(self):
        return [leaf for leaf in self[:4] if leaf is not None]


def kernel_of(backend):
    """The module that implements a backend."""
    return dispatch.OPS["rope"].candidate(backend).load()


def inputs(shape, dtype=F32, norm_dtype=None, device="cpu", seed=0):
    """From one seed; shape is (tokens, query heads, key heads, D, R)."""
    tokens, q_heads, k_heads, head_dim, rotary = shape
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    norms = [None if norm_dtype is None else leaf(head_dim, dtype=norm_dtype) for _ in range(2)]
    positions = torch.randint(0, 4096, (tokens,), generator=generator).to(device)
    table = rope_table(positions, frequencies(1e4, rotary, positions.device), scaling=1.25)
    return Inputs(leaf(tokens, q_heads, head_dim), leaf(tokens, k_heads, head_dim), *norms, table)


def turn(place, given, style="half", norm_style="llama", **options):
    """One call of rope on what `inputs` made."""
    return rope(
        given.q,
        given.k,
        table=given.table,
        style=style,
        q_norm=given.q_norm,
        k_norm=given.k_norm,
        eps=EPS,
        norm_style=norm_style,
        backend=place.backend,
        **options,
    )


def assert_exact(place, given, style, norm_style="llama"):
    """Forward and all gradients of one call are within what their roundings allow."""
    outputs = turn(place, given, style, norm_style)
    grads = [torch.sin(3 * out.detach() + 1) for out in outputs]
    torch.autograd.backward(outputs, grads)
    for x, y, dy, weight in zip(given[:2], outputs, grads, given[2:4], strict=True):
        norm = None if weight is None else Norm(weight, EPS, norm_style)
        expected = rope_expected(x, *given.table, style, dy, norm, place.truncating)
        found = {"y": y, "dx": x.grad, "dweight": None if weight is None else weight.grad}
        assert y.is_contiguous() and y.dtype == x.dtype
        for name in expected:
            assert expected[name].ratio(found[name]) <= 1, name


def call(place, given, style="half", norm_style="llama"):
    """q', k' and all gradients of one call, for comparisons of bits."""
    copies = [None if t is None else t.detach().clone().requires_grad_() for t in given[:4]]
    given = Inputs(*copies, given.table)
    outputs = turn(place, given, style, norm_style)
    grads = torch.autograd.grad(outputs, given.leaves, [torch.sin(3 * y.detach()) for y in outputs])
    return [*(out.detach() for out in outputs), *grads]


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
