"""Calls of rms_norm that its tests make: inputs, comparisons with exact values, and of bits."""

from types import SimpleNamespace

import torch
from fasttrain_kernels import dispatch, rms_norm, testing
from fasttrain_kernels.ops.rms_norm import reference

EPS = 1e-6
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
STYLES = reference.STYLES
CPU = SimpleNamespace(backend="cpu", device="cpu", truncating=False)


def kernel_of(backend):
    """The module that implements a backend."""
    return dispatch.OPS["rms_norm"].candidate(backend).load()


def inputs(shape, dtype=F32, weight_dtype=None, residual_dtype=None, device="cpu", seed=0):
    """x, weight, residual as leaves that want gradients, from one seed."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(shape, dtype):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    residual = None if residual_dtype is None else leaf(shape, residual_dtype)
    return leaf(shape, dtype), leaf(shape[-1:], weight_dtype or dtype), residual


def assert_exact(place, x, weight, residual, style, seed=1):
    """Forward and all gradients of one call are within what their roundings allow."""
    generator = torch.Generator().manual_seed(seed)
    result = rms_norm(x, weight, EPS, residual=residual, style=style, backend=place.backend)
    y, total = (result, x) if residual is None else result
    dy = torch.randn(y.shape, generator=generator).to(y)
    dsum = None if residual is None else torch.randn(y.shape, generator=generator).to(total)
    torch.autograd.backward(
        [y] if dsum is None else [y, total], [dy] if dsum is None else [dy, dsum]
    )

    if residual is not None:
        limit = testing.ROUNDOFF[total.dtype] * (2 if place.truncating else 1)
        exact = x.detach().double() + residual.detach().double()
        assert total.dtype == torch.promote_types(x.dtype, residual.dtype)
        assert ((total.double() - exact).abs() <= limit * exact.abs()).all()
    width = x.shape[-1]
    expected = testing.rms_norm_expected(
        total.detach().reshape(-1, width),
        weight,
        EPS,
        style,
        dy=dy.reshape(-1, width),
        dsum=None if dsum is None else dsum.reshape(-1, width),
        output_dtype=y.dtype,
        truncating=place.truncating,
    )
    assert expected["y"].ratio(y.reshape(-1, width)) <= 1
    assert expected["dweight"].ratio(weight.grad) <= 1
    for leaf in filter(lambda leaf: leaf is not None, (x, residual)):
        assert leaf.grad.dtype == leaf.dtype
        limit = expected["dx"].limit + testing.ROUNDOFF[leaf.dtype] * expected["dx"].value.abs()
        ratio = testing.Expected(expected["dx"].value, limit).ratio(leaf.grad.reshape(-1, width))
        assert ratio <= 1
    assert weight.grad.dtype == weight.dtype


def call(place, x, weight, residual=None, style="llama"):
    """y and all gradients of one call, for comparisons of bits."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight) if t is not None]
    residual = None if residual is None else residual.detach().clone().requires_grad_()
    result = rms_norm(*leaves, EPS, residual=residual, style=style, backend=place.backend)
    outputs = (result,) if residual is None else result
    torch.autograd.backward(outputs, [torch.sin(out.detach() * 3) for out in outputs])
    grads = [leaf.grad for leaf in (*leaves, residual) if leaf is not None]
    return [*(out.detach() for out in outputs), *grads]


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
