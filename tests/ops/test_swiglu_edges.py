"""swiglu and geglu at the edges: no rows, odd strides, partial gradients, infinities, memory."""

import contextlib
import math

import pytest
import torch
from fasttrain_kernels import native, swiglu, testing
from ops.glu_calls import BF16, CPU, F32, F64, GLU, call, inputs, kernel_of, same_bits
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = pytest.mark.parametrize("activation", GLU)
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("layout", ["whole", "packed"])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (1, 64)], ids=str)
def test_no_rows_and_one_row(place, shape, layout):
    found = call(place, "silu", *inputs(shape, device=place.device), layout)
    assert all(t.shape == shape for t in found)


@pytest.mark.parametrize("kind", ["transposed", "columns", "every other row", "expanded", "offset"])
def test_odd_strides(place, kind):
    base = torch.randn(4, 3, 24).to(place.device)
    odd = {
        "transposed": base.transpose(0, 2),  # (24, 3, 4), no stride is 1 but dim 0's
        "columns": base[..., 5:17],
        "every other row": base.view(12, 24)[::2, :12],
        "expanded": base[0, :1, :12].expand(5, 12),
        "offset": base.flatten()[3 : 3 + 60].view(5, 12),  # 12 bytes off any vector's alignment
    }[kind]
    other = torch.randn(odd.shape).to(place.device)
    for gate, up, dy in ((odd, other, other), (other, odd, other), (other, other, odd)):
        plain = call(place, "silu", gate.contiguous(), up.contiguous(), dy.contiguous())
        assert same_bits(call(place, "silu", gate, up, dy), plain)


def test_a_gradient_of_stride_zero(place):
    gate, up, _ = (t.requires_grad_() for t in inputs((6, 40), device=place.device))
    y = swiglu(gate, up, backend=place.backend)
    summed = torch.autograd.grad(y.sum(), (gate, up), retain_graph=True)
    assert same_bits(summed, torch.autograd.grad(y, (gate, up), torch.ones_like(y)))


@pytest.mark.parametrize("wanted", ["gate", "up"])
@ACTIVATIONS
def test_only_what_wants_a_gradient_gets_one(place, activation, wanted, monkeypatch):
    gate, up, dy = inputs((6, 40), device=place.device)
    _, *full = call(place, activation, gate, up, dy)
    kernel, asked = kernel_of(place.backend, activation), []
    real = kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *a: (asked.append(a[4:]), real(*a))[1])
    leaves = [t.requires_grad_(name == wanted) for name, t in (("gate", gate), ("up", up))]
    GLU[activation](*leaves, backend=place.backend).backward(dy)
    for leaf, gradient in zip(leaves, full, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)
    assert [t is not None for t in asked[0]] == [leaf.requires_grad for leaf in leaves]


def test_without_gradients(place):
    gate, up, _ = inputs((6, 40), device=place.device)
    assert not swiglu(gate, up, backend=place.backend).requires_grad
    same = torch.randn(6, 40, device=place.device).requires_grad_()
    y = swiglu(same, same, backend=place.backend)  # one tensor for both
    (gradient,) = torch.autograd.grad(y.sum(), same)
    _, dgate, dup = call(place, "silu", same, same, torch.ones_like(y))
    torch.testing.assert_close(gradient, dgate + dup)


def test_outputs_may_be_changed_in_place(place):
    gate, up, _ = (t.requires_grad_() for t in inputs((2, 3, 40), device=place.device))
    plain = torch.autograd.grad((swiglu(gate, up, backend=place.backend) * 2).sum(), (gate, up))
    y = swiglu(gate, up, backend=place.backend)
    y *= 2
    assert same_bits(plain, torch.autograd.grad(y.sum(), (gate, up)))


def test_inputs_changed_in_place_are_noticed(place):
    gate, up, _ = inputs((2, 40), device=place.device)
    y = swiglu(gate, up.requires_grad_(), backend=place.backend)
    gate += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_gives_the_same(place):
    gate, up, _ = (t.requires_grad_() for t in inputs((5, 48), device=place.device))
    y = swiglu(gate, up, backend=place.backend)
    first = torch.autograd.grad((y * y).sum(), (gate, up), retain_graph=True)
    assert same_bits(first, torch.autograd.grad((y * y).sum(), (gate, up)))


def test_a_gradient_of_a_gradient_is_refused():
    for name, activation in (("swiglu", "silu"), ("geglu", "gelu")):
        gate, up, _ = (t.requires_grad_() for t in inputs((2, 8)))
        with pytest.raises(RuntimeError, match=f"{name} is differentiable once"):
            torch.autograd.grad(GLU[activation](gate, up).sum(), gate, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(place, reentrant):
    gate, up, _ = (t.requires_grad_() for t in inputs((5, 48), device=place.device))

    def block(gate, up):
        return torch.tanh(swiglu(gate, up, backend=place.backend)).sum()

    plain = torch.autograd.grad(block(gate, up), (gate, up))
    checkpoint(block, gate, up, use_reentrant=reentrant).backward()
    assert same_bits(plain, (gate.grad, up.grad))


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@ACTIVATIONS
def test_large_and_infinite_gates_give_their_limits(place, activation, dtype):
    if place.backend == "triton" and dtype == F64:
        pytest.skip("Triton kernels compute in float32, and say so")
    gate = torch.tensor([-INF, -1e30, -1e4, 1e4, 1e30, INF], dtype=dtype, device=place.device)
    y, dgate, dup = call(place, activation, gate, 2 * torch.ones_like(gate), torch.ones_like(gate))
    gate = gate.where(gate > 0, 0)
    assert torch.equal(dup, gate) and torch.equal(y, 2 * gate)
    assert torch.equal(dgate, 2 * (gate > 0).to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@ACTIVATIONS
def test_not_a_number_stays_in_its_element(place, activation, dtype):
    gate, up, dy = inputs((2, 33), dtype, place.device)
    plain = call(place, activation, gate, up, dy)
    gate[0, 3], up[1, 5], dy[1, 32] = NAN, NAN, NAN
    y, dgate, dup = call(place, activation, gate, up, dy)
    for found, before, reached in zip(
        (y, dgate, dup),
        plain,
        ([(0, 3), (1, 5)], [(0, 3), (1, 5), (1, 32)], [(0, 3), (1, 32)]),
        strict=True,
    ):
        assert found.isnan().nonzero().tolist() == [list(at) for at in reached]
        assert torch.equal(found[~found.isnan()], before[~found.isnan()])


@pytest.mark.parametrize("layout", ["whole", "packed"])
def test_every_element_is_written(place, layout):
    with testing.nan_filled_memory():
        for activation in GLU:
            found = call(place, activation, *inputs((5, 19), BF16, place.device), layout)
            assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("width", [1, 7, 16, 33])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_outside_is_read_or_written(place, width, dtype):
    if place.device != "cpu":
        pytest.skip("guard pages are made on the CPU")
    kernel = kernel_of(place.backend)
    tensors = [*inputs((2, width), dtype), *inputs((2, width), dtype, seed=1)]
    for activation in GLU:
        with contextlib.ExitStack() as guards:
            gate, up, dy, y, dgate, dup = (
                guards.enter_context(testing.guarded(tensor)) for tensor in tensors
            )
            kernel.forward(gate, up, activation, y)
            kernel.backward(dy, gate, up, activation, dgate, dup)
        with testing.guarded(torch.cat(tensors[:2], -1)) as packed:
            gate, up = packed.chunk(2, -1)
            kernel.forward(gate, up, activation, tensors[3])
            kernel.backward(tensors[2], gate, up, activation, gate, up)


def test_the_gaps_between_rows_are_left_alone(place):
    kernel = kernel_of(place.backend)
    gate, up, dy = inputs((3, 21), device=place.device)
    wide, wider = (torch.full((3, columns), 7.0, device=place.device) for columns in (25, 40))
    kernel.backward(dy, gate, up, "silu", wide[:, :21], wider[:, :21])
    assert same_bits((wide[:, :21], wider[:, :21]), call(place, "silu", gate, up, dy)[1:])
    assert all((target[:, 21:] == 7).all() for target in (wide, wider))


def test_large_outputs():
    """Of which the pages are asked to be large."""
    assert native.why_not("_C_cpu") is None
    gate, up, dy = inputs((3, 700_001))
    large = call(CPU, "silu", gate, up, dy)
    parts = [call(CPU, "silu", *(t[row] for t in (gate, up, dy))) for row in range(3)]
    assert same_bits(large, [torch.stack(each) for each in zip(*parts, strict=True)])


def test_more_than_two_to_the_31_elements(place):
    if place.device != "cpu":
        pytest.skip("sparse memory is made on the CPU")
    stride = 2**30 + 7  # the third row begins past 2^31 elements
    near = inputs((3, 64), BF16)
    kernel = kernel_of(place.backend)
    with contextlib.ExitStack() as stack:
        far = [stack.enter_context(testing.sparse_rows(3, 64, stride, BF16)).copy_(t) for t in near]
        written = [stack.enter_context(testing.sparse_rows(3, 64, stride, BF16)) for _ in range(3)]
        gate, up, dy = far
        kernel.forward(gate, up, "silu", written[0])
        kernel.backward(dy, gate, up, "silu", *written[1:])
        assert same_bits(written, call(place, "silu", *near))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows, width = 2**31 // 4096 + 8, 4096
    gate = torch.randn(rows, width, device="cuda", dtype=BF16)
    y = swiglu(gate, gate, backend="triton")
    tail = gate[-8:].clone()
    assert torch.equal(y[-8:], swiglu(tail, tail, backend="triton"))
