"""rms_norm at the edges: no rows, odd strides, partial gradients, NaN, memory it must not touch."""

import contextlib

import pytest
import torch
from fasttrain_kernels import native, rms_norm, testing
from ops.rms_norm_calls import BF16, EPS, F32, STYLES, call, inputs, kernel_of, same_bits
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (1, 64)], ids=str)
def test_no_rows_and_one_row(place, shape):
    x, weight, residual = inputs(shape, residual_dtype=F32, device=place.device)
    y, total = rms_norm(x, weight, residual=residual, backend=place.backend)
    (y.sum() + total.sum()).backward()
    assert y.shape == total.shape == x.grad.shape == residual.grad.shape == x.shape
    if x.numel() == 0:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("kind", ["transposed", "columns", "every other row", "expanded", "offset"])
def test_odd_strides(place, kind):
    base = torch.randn(12, 12, 24).to(place.device)
    x = {
        "transposed": base.transpose(0, 2),  # (24, 12, 12), no stride is 1 but dim 0's
        "columns": base[..., 5:17],
        "every other row": base.view(144, 24)[::2, :12],
        "expanded": base[0, :1, :12].expand(7, 12),
        "offset": base.flatten()[3 : 3 + 60].view(5, 12),  # 12 bytes off any vector's alignment
    }[kind]
    weight, dy = torch.randn(24, device=place.device)[::2], torch.randn(12, device=place.device)
    results = []
    for odd in (True, False):
        leaf = x.detach().clone() if not odd else x.detach()
        leaf.requires_grad_()
        w = (weight if odd else weight.clone()).detach().requires_grad_()
        y = rms_norm(leaf, w, backend=place.backend)
        y.backward(dy.expand_as(y))  # a gradient of stride 0, as .sum() makes
        results.append((y.detach(), leaf.grad.clone(), w.grad))
    assert results[0][0].is_contiguous()
    for odd, plain in zip(*results, strict=True):
        torch.testing.assert_close(odd, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["x", "weight", "residual"])
def test_only_what_wants_a_gradient_gets_one(place, wanted):
    leaves = dict(
        zip(("x", "weight", "residual"), inputs((6, 40), residual_dtype=F32), strict=True)
    )
    full = call(place, *(leaf.to(place.device) for leaf in leaves.values()))[2:]
    given = {
        name: leaf.detach().to(place.device).requires_grad_(name == wanted)
        for name, leaf in leaves.items()
    }
    x, weight, residual = given.values()
    outputs = rms_norm(x, weight, EPS, residual=residual, backend=place.backend)
    torch.autograd.backward(outputs, [torch.sin(out.detach() * 3) for out in outputs])
    for (name, leaf), expected in zip(given.items(), full, strict=True):
        assert (leaf.grad is not None) == (name == wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected)


def test_only_the_sum_is_used(place):
    x, weight, residual = inputs((6, 40), BF16, residual_dtype=F32, device=place.device)
    rms_norm(x, weight, residual=residual, backend=place.backend)[1].sum().backward()
    assert x.grad.unique().tolist() == [1.0] and residual.grad.unique().tolist() == [1.0]
    assert weight.grad is None


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40)], ids=str)
def test_outputs_may_be_changed_in_place(place, shape):
    """Models do: `hidden *= scale`."""
    x, weight, residual = inputs(shape, residual_dtype=F32, device=place.device)
    plain = torch.autograd.grad((rms_norm(x, weight, backend=place.backend) * 2).sum(), (x, weight))
    y = rms_norm(x, weight, backend=place.backend)
    y *= 2
    assert same_bits(plain, torch.autograd.grad(y.sum(), (x, weight)))
    y, total = rms_norm(x, weight, residual=residual, backend=place.backend)
    y += 1
    torch.autograd.backward((y, total), (torch.ones_like(y), torch.ones_like(y)))
    total.add_(1)  # the backward pass needed it; now nothing does
    assert x.grad.isfinite().all()


def test_a_second_backward_gives_the_same(place):
    x, weight, residual = inputs((20, 48), residual_dtype=F32, device=place.device)
    y, total = rms_norm(x, weight, residual=residual, backend=place.backend)
    out = (y * y).sum() + total.sum()
    first = torch.autograd.grad(out, (x, weight, residual), retain_graph=True)
    assert same_bits(first, torch.autograd.grad(out, (x, weight, residual)))


def test_a_gradient_of_a_gradient_is_refused():
    x, weight, _ = inputs((2, 8))
    with pytest.raises(RuntimeError, match="rms_norm is differentiable once"):
        torch.autograd.grad(rms_norm(x, weight).sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(place, reentrant):
    x, weight, residual = inputs((20, 48), residual_dtype=F32, device=place.device)

    def block(x, weight, residual):
        y, total = rms_norm(x, weight, residual=residual, backend=place.backend)
        return (torch.tanh(y) + total).sum()

    plain = torch.autograd.grad(block(x, weight, residual), (x, weight, residual))
    recomputed = checkpoint(block, x, weight, residual, use_reentrant=reentrant)
    recomputed.backward()
    assert same_bits(plain, (x.grad, weight.grad, residual.grad))


def test_not_a_number_stays_in_its_row(place):
    x, weight, _ = inputs((5, 33), device=place.device)
    with torch.no_grad():
        x[1, 3], x[2, 0] = float("nan"), float("inf")
    y = rms_norm(x, weight, backend=place.backend)
    finite = y.isfinite().all(-1)
    assert finite.tolist() == [True, False, False, True, True]
    zeros = rms_norm(torch.zeros_like(x), weight, backend=place.backend)
    assert torch.equal(zeros, torch.zeros_like(x))


def test_every_element_is_written(place):
    with testing.nan_filled_memory():
        for style in STYLES:
            leaves = inputs((35, 19), BF16, F32, BF16, device=place.device)
            assert all(out.isfinite().all() for out in call(place, *leaves, style))


@pytest.mark.parametrize("width", [1, 7, 16, 33, 1000])
def test_nothing_outside_is_read(place, width):
    if place.device != "cpu":
        pytest.skip("guard pages are made on the CPU")
    x, weight, residual = (t.detach() for t in inputs((5, width), BF16, F32, BF16))
    kernel = kernel_of(place.backend)
    with testing.guarded(x) as x, testing.guarded(weight) as weight:
        with testing.guarded(residual) as residual:
            y, total, rstd = kernel.forward(x, weight, EPS, residual, "llama")
        with contextlib.ExitStack() as guards:
            saved = [
                guards.enter_context(testing.guarded(t)) for t in (y, total, total, weight, rstd)
            ]
            kernel.backward(*saved, "llama", True, True)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_outside_is_written_by_the_native_kernel(dtype):
    assert native.why_not("_C_cpu") is None
    x, weight, residual = (t.detach() for t in inputs((35, 27), dtype, F32, dtype))
    ops = torch.ops.fasttrain_native
    with contextlib.ExitStack() as guards:
        y, total, dx = (guards.enter_context(testing.guarded(x)) for _ in range(3))
        rstd = guards.enter_context(testing.guarded(torch.empty(35)))
        dweight = guards.enter_context(testing.guarded(weight))
        partials = guards.enter_context(testing.guarded(torch.empty(2, 27)))
        ops.rms_norm_forward(x, weight, residual, EPS, True, y, total, rstd)
        ops.rms_norm_backward(y, total, total, weight, rstd, dx, dweight, partials)


def test_more_than_two_to_the_31_elements(place):
    if place.device != "cpu":
        pytest.skip("sparse memory is made on the CPU")
    stride = 2**30 + 7  # the third row begins past 2^31 elements
    with testing.sparse_rows(3, 64, stride, BF16) as x:
        x[0], x[1], x[2] = 1.0, 2.0, torch.arange(64)
        weight = torch.ones(64, dtype=BF16)
        dense = x.clone()
        assert x.stride(0) * 2 > 2**31 and dense.is_contiguous()
        kernel = kernel_of(place.backend)
        far = kernel.forward(x, weight, EPS, x, "llama")
        near = kernel.forward(dense, weight, EPS, dense, "llama")
        assert same_bits(far, near)
        one, other = (
            kernel.backward(dense, dense, s, weight, near[2], "llama", True, True)
            for s in (x, dense)
        )
        assert same_bits(one, other)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows, width = 2**31 // 4096 + 8, 4096
    x = torch.randn(rows, width, device="cuda", dtype=BF16)
    weight = torch.randn(width, device="cuda", dtype=BF16)
    y = rms_norm(x, weight, backend="triton")
    tail = rms_norm(x[-8:].clone(), weight, backend="triton")
    assert torch.equal(y[-8:], tail)
