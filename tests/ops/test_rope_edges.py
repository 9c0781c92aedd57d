"""rope at the edges: nothing to turn, odd strides, partial gradients, memory it must not touch."""

import contextlib

import pytest
import torch
from fasttrain_kernels import native, rope, testing
from ops.rope_calls import BF16, EPS, F32, STYLES, Inputs, call, inputs, kernel_of, same_bits, turn
from torch.utils.checkpoint import checkpoint

NORMS = pytest.mark.parametrize("norm_dtype", [None, F32], ids=["plain", "norm"])


@NORMS
@pytest.mark.parametrize("shape", [(0, 2, 1, 8, 8), (2, 0, 1, 8, 6), (1, 1, 0, 8, 8)], ids=str)
def test_no_tokens_and_no_heads(place, shape, norm_dtype):
    given = inputs(shape, F32, norm_dtype, place.device)
    outputs = turn(place, given)
    torch.autograd.backward(outputs, outputs)
    for x, y, weight in zip(given[:2], outputs, given[2:4], strict=True):
        assert x.shape == y.shape == x.grad.shape
        if x.numel() == 0 and weight is not None:
            assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["fused", "heads first", "every other", "expanded", "offset"])
def test_odd_strides(place, kind, style):
    tokens, heads, width = 2, 2, 12
    base = torch.randn(4, 7, 30).to(place.device)
    x = {
        "fused": base[:tokens, 2:4, 5:17],
        "heads first": base.transpose(0, 1)[:tokens, :heads, :width],
        "every other": base[:tokens, :heads, : 2 * width : 2],
        "expanded": base[:1, :1, :width].expand(tokens, heads, width),
        "offset": base.flatten()[1 : 1 + 48].view(tokens, heads, width),  # off any alignment
    }[kind]
    wide = torch.randn(tokens, 2, 20).to(place.device)
    tables = {"every other": wide[:, 0, ::4], "expanded": wide[:1, 0, :5].expand(tokens, 5)}
    part = tables.get(kind, wide[:, 1, 3:8])
    results = []
    for odd in (True, False):
        q, k, c, g = (
            t if odd else t.clone(memory_format=torch.contiguous_format) for t in (x, x, part, x)
        )
        given = Inputs(q.detach().requires_grad_(), k.detach().requires_grad_(), None, None, (c, c))
        outputs = turn(place, given, style)
        results.append((*outputs, *torch.autograd.grad(outputs, given[:2], (g, g))))
        assert all(out.is_contiguous() for out in outputs)
    assert same_bits(*results)


def test_odd_strides_under_a_norm(place):
    fused = torch.randn(2, 5, 12).to(place.device)
    weights = torch.rand(24, device=place.device)[::2]
    results = []
    for odd in (True, False):
        views = fused[:, :2], fused[:, 2:4], weights, weights
        made = [t if odd else t.contiguous().clone() for t in views]
        table = inputs((2, 1, 1, 12, 8), device=place.device).table
        given = Inputs(*(t.detach().requires_grad_() for t in made), table)
        outputs = turn(place, given)
        grads = fused[:, 1:3], fused[:, :1].expand(2, 2, 12)
        grads = [g if odd else g.contiguous().clone() for g in grads]
        results.append((*outputs, *torch.autograd.grad(outputs, given.leaves, grads)))
    assert same_bits(*results)


@pytest.mark.parametrize("wanted", ["q", "k", "q_norm", "k_norm"])
def test_only_what_wants_a_gradient_gets_one(place, wanted, monkeypatch):
    given = inputs((2, 2, 1, 8, 6), F32, F32, place.device)
    full = dict(zip(Inputs._fields[:4], call(place, given)[2:], strict=True))
    leaves = [t.detach().requires_grad_(n == wanted) for n, t in full_names(given)]
    kernel, computed = kernel_of(place.backend), []
    backward = kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *a: computed.extend(a[-1]) or backward(*a))
    outputs = turn(place, Inputs(*leaves, given.table))
    torch.autograd.backward(outputs, [torch.sin(3 * out.detach()) for out in outputs])
    assert computed == [name == wanted for name in full]
    for name, leaf in zip(full, leaves, strict=True):
        assert (leaf.grad is not None) == (name == wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, full[name])


def full_names(given):
    return zip(Inputs._fields[:4], given[:4], strict=True)


@NORMS
def test_only_one_output_is_used(place, norm_dtype):
    given = inputs((2, 2, 1, 8, 8), F32, norm_dtype, place.device)
    turn(place, given)[1].sum().backward()
    assert given.q.grad is None and given.k.grad is not None
    assert norm_dtype is None or (given.q_norm.grad is None and given.k_norm.grad is not None)
    plain = inputs((2, 2, 1, 8, 8), device=place.device)
    rope(plain.q, plain.k.detach(), table=plain.table, backend=place.backend)[0].sum().backward()
    assert plain.q.grad is not None


def test_nothing_of_queries_and_keys_is_saved_without_a_norm(place):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        given = inputs((2, 2, 1, 8, 8), device=place.device)
        turn(place, given)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in given.table}


def test_outputs_may_be_changed_in_place(place):
    given = inputs((2, 2, 1, 8, 8), device=place.device)
    q, k = turn(place, given)
    before = torch.autograd.grad((q * 2).sum() + k.sum(), given[:2], retain_graph=True)
    q, k = turn(place, given)
    q *= 2
    assert same_bits(before, torch.autograd.grad(q.sum() + k.sum(), given[:2]))


@NORMS
def test_a_second_backward_gives_the_same(place, norm_dtype):
    given = inputs((2, 2, 1, 8, 8), F32, norm_dtype, place.device)
    q, k = turn(place, given)
    out = (q * q).sum() + (k * k).sum()
    first = torch.autograd.grad(out, given.leaves, retain_graph=True)
    assert same_bits(first, torch.autograd.grad(out, given.leaves))


def test_a_gradient_of_a_gradient_is_refused():
    given = inputs((2, 2, 1, 8, 8))
    with pytest.raises(RuntimeError, match="rope is differentiable once"):
        torch.autograd.grad(
            rope(*given[:2], table=given.table)[0].sum(), given.q, create_graph=True
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(place, reentrant):
    given = inputs((2, 2, 1, 8, 6), F32, F32, place.device)

    def block(*leaves):
        q, k = turn(place, Inputs(*leaves, given.table))
        return (torch.tanh(q).sum() + torch.tanh(k)).sum()

    plain = torch.autograd.grad(block(*given.leaves), given.leaves)
    checkpoint(block, *given.leaves, use_reentrant=reentrant).backward()
    assert same_bits(plain, [leaf.grad for leaf in given.leaves])


@NORMS
def test_not_a_number_stays_in_its_head(place, norm_dtype):
    given = inputs((3, 3, 1, 8, 6), F32, norm_dtype, place.device)
    with torch.no_grad():
        given.q[0, 1, 2], given.q[1, 2, 7] = float("nan"), float("inf")
    finite = turn(place, given)[0].isfinite().all(-1)
    assert finite.tolist() == [[True, False, True], [True, True, False], [True, True, True]]


@NORMS
@pytest.mark.parametrize("style", STYLES)
def test_every_element_is_written(place, style, norm_dtype):
    with testing.nan_filled_memory():
        given = inputs((3, 3, 2, 19, 14), BF16, norm_dtype, device=place.device)
        assert all(out.isfinite().all() for out in call(place, given, style))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 2), (2, 3, 2, 15, 6), (1, 2, 1, 83, 76)], ids=str)
def test_nothing_outside_is_read(place, shape, style):
    if place.device != "cpu":
        pytest.skip("guard pages are made on the CPU")
    given = inputs(shape, BF16, F32)
    kernel = kernel_of(place.backend)
    tensors = (*(leaf.detach() for leaf in given.leaves[:2]), *given.table)
    weights = [leaf.detach() for leaf in given.leaves[2:]]
    with contextlib.ExitStack() as guards:
        q, k, cos, sin, *weights = (
            guards.enter_context(testing.guarded(t)) for t in (*tensors, *weights)
        )
        rest = (EPS, "gemma", style)
        dq, dk = (guards.enter_context(testing.guarded(t)) for t in (q, k))
        for norms, saved in ((weights, (q, k)), ((None, None), (None, None))):
            kernel.forward(q, k, cos, sin, *norms, *rest)
            needs = [True, True, norms[0] is not None, norms[0] is not None]
            kernel.backward(dq, dk, *saved, cos, sin, *norms, *rest, needs)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_outside_is_written_by_the_native_kernel(dtype):
    assert native.why_not("_C_cpu") is None
    ops = torch.ops.fasttrain_native
    for shape in ((35, 2, 1, 27, 22), (3, 1, 1, 2, 2), (3, 2, 1, 26, 26)):
        given = inputs(shape, dtype, F32)
        q, k, q_norm, k_norm = (leaf.detach() for leaf in given.leaves)
        with contextlib.ExitStack() as guards:

            def guarded(tensor, guards=guards):
                return guards.enter_context(testing.guarded(tensor))

            outs = guarded(q), guarded(k)
            dweight, partials = (
                guarded(torch.empty(2, shape[3])),
                guarded(torch.empty(2, 2, shape[3])),
            )
            for interleaved in (False, True):
                rest = (*given.table, q_norm, k_norm, EPS, interleaved)
                ops.rope_forward(q, k, *rest, False, *outs)
                ops.rope_forward(q, k, *given.table, None, None, EPS, interleaved, True, *outs)
                ops.rope_norm_backward(q, k, q, k, *rest, *outs, dweight, partials)


def test_more_than_two_to_the_31_elements(place):
    if place.device != "cpu":
        pytest.skip("sparse memory is made on the CPU")
    stride = 2**30 + 7  # the third token, and the third head, begin past 2^31 elements
    given = inputs((3, 3, 1, 8, 6), BF16, F32)
    near, kernel = given.q.detach(), kernel_of(place.backend)
    weight, rest = given.q_norm.detach(), (EPS, "llama", "half")
    with testing.sparse_rows(3, 64, stride, BF16) as rows:
        by_token = rows[:, :24].view(3, 3, 8)
        by_head = rows[:, 24:48].unflatten(1, (3, 8)).transpose(0, 1)
        assert by_token.stride(0) * 2 > 2**31 and by_head.stride(1) * 2 > 2**31
        for far in (by_token, by_head):
            far.copy_(near)
        expected = kernel.forward(near, near, *given.table, weight, weight, *rest)
        assert same_bits(
            expected, kernel.forward(by_token, by_head, *given.table, weight, weight, *rest)
        )
        needs = [True] * 4
        one, other = (
            kernel.backward(a, b, b, a, *given.table, weight, weight, *rest, needs)
            for a, b in ((by_token, by_head), (near, near))
        )
        assert same_bits(one, other)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tokens = 2**31 // 4096 + 8
    q = torch.randn(tokens, 32, 128, device="cuda", dtype=BF16)
    cos = torch.randn(tokens, 64, device="cuda")
    far = rope(q, q[:, :1], table=(cos, cos), backend="triton")[0][-8:]
    tail = q[-8:].clone()
    near = rope(tail, tail[:, :1], table=(cos[-8:], cos[-8:]), backend="triton")[0]
    assert torch.equal(far, near)
