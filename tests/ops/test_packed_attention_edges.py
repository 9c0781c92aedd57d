"""packed_attention at the edges: no tokens, odd strides, partial gradients, memory it must not
touch."""

import contextlib

import pytest
import torch
from fasttrain_kernels import DocumentLayout, testing
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask
from ops.attention_calls import (
    BF16,
    EAGER,
    F16,
    F32,
    LENGTHS,
    Attention,
    attend,
    copies,
    kernel_of,
    leaves_of,
    offsets_of,
    results,
    richest,
    same_bits,
    upstream,
)
from torch.utils.checkpoint import checkpoint

PLAIN = Attention(LENGTHS)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_no_tokens(place, lengths, dtype):
    call = richest(place)._replace(lengths=lengths)
    leaves = leaves_of(place, (2, 1, 16), call, dtype)
    o, *grads = results(place, leaves, call)
    assert o.shape == (0, 2, 16) and o.dtype == dtype
    assert [g.shape for g in grads] == [t.shape for t in leaves if t is not None]
    assert call.sinks is None or not grads[3].any()


# ---- memory --------------------------------------------------------------------------------------


def strided(kind, shape, device):
    """A leaf (T, H, D) that lies oddly in memory."""
    tokens, heads, width = shape
    base = torch.randn(4 * tokens * heads * width + 7, device=device)

    def view(*sizes):
        return base[: torch.Size(sizes).numel()].view(sizes)

    return {
        "heads first": lambda: view(heads, tokens, width).transpose(0, 1),
        "columns": lambda: view(tokens, heads, 2 * width)[..., 3 : 3 + width],
        "every other token": lambda: view(2 * tokens, heads, width)[::2],
        "every other head": lambda: view(tokens, 2 * heads, width)[:, 1::2],
        "every other element": lambda: view(tokens, heads, 2 * width)[..., ::2],
        "transposed": lambda: view(width, heads, tokens).transpose(0, 2),
        "one token for all": lambda: view(1, heads, width).expand(shape),
        "one head for all": lambda: view(tokens, 1, width).expand(shape),
        "offset": lambda: base[3 : 3 + tokens * heads * width].view(shape),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "heads first",
        "columns",
        "every other token",
        "every other head",
        "every other element",
        "transposed",
        "one token for all",
        "one head for all",
        "offset",
    ],
)
def test_odd_strides(place, kind):
    call = richest(place)
    _, _, _, sinks = leaves_of(place, (2, 2, 16), call)
    q, k, v, do = (strided(kind, (44, 2, 16), place.device) for _ in range(4))
    odd = [leaf.requires_grad_() for leaf in (q, k, v)]
    o = attend(place, (*odd, sinks), call)
    grads = torch.autograd.grad(o, odd, do)
    plain = results(place, (q, k, v, sinks), call, do.contiguous())
    assert o.is_contiguous()
    for one, other in zip((o, *grads), plain, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_stride_zero(place):
    call = richest(place)
    leaves = leaves_of(place, (2, 1, 16), call)
    wanted = [leaf for leaf in leaves if leaf is not None]
    o = attend(place, leaves, call)
    from_sum = torch.autograd.grad(o.sum(), wanted, retain_graph=True)
    assert same_bits(from_sum, torch.autograd.grad(o, wanted, torch.ones_like(o)))


def test_slices_of_one_projection(place):
    """As a model has them: q, k and v are columns of one tensor, which gets one gradient."""
    call = richest(place)
    q, k, v, sinks = leaves_of(place, (2, 1, 16), call)
    plain = results(place, (q, k, v, sinks), call)
    fused = torch.cat([t.detach().flatten(1) for t in (q, k, v)], 1).requires_grad_()
    heads = [t.unflatten(1, (-1, 16)) for t in fused.split((32, 16, 16), 1)]
    o = attend(place, (*heads, sinks), call)
    o.backward(upstream(o))
    together = torch.cat([g.flatten(1) for g in plain[1:4]], 1)
    torch.testing.assert_close(o, plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.grad, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_every_element_is_written(place, dtype):
    for call in (PLAIN, richest(place)._replace(causal=False)):
        leaves = leaves_of(place, (2, 1, 19), call, dtype)
        plain = results(place, leaves, call)
        with testing.nan_filled_memory():
            assert same_bits(plain, results(place, leaves, call))


def tensors_of(place, call, shape, dtype):
    """[q, k, v, do] and sinks on the CPU; the documents and the mask: for a backend's module."""
    if place.device != "cpu":
        pytest.skip("traps are laid in the CPU's memory")
    q, k, v, sinks = leaves_of(place, shape, call, dtype)
    layout = DocumentLayout(call.lengths)
    documents = Documents(offsets_of(call), layout.offsets, layout.tiles)
    mask = Mask(call.causal, call.window, call.softcap, call.scale or shape[2] ** -0.5)
    heads = [t.detach() for t in (q, k, v, upstream(q))]
    return heads, None if sinks is None else sinks.detach(), documents, mask


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 16, 19, 80])
def test_nothing_outside_is_read(place, width, dtype):
    call = richest(place)._replace(lengths=(5, 0, 30) if place.truncating else (5, 0, 130))
    (q, k, v, do), sinks, documents, mask = tensors_of(place, call, (2, 1, width), dtype)
    kernel = kernel_of(place.backend)
    with contextlib.ExitStack() as guards:

        def guarded(tensor):
            return guards.enter_context(testing.guarded(tensor))

        q, k, v, do = map(guarded, (q, k, v, do))
        sinks = None if sinks is None else guarded(sinks)
        documents = Documents(*map(guarded, documents))
        o, lse = kernel.forward(q, k, v, documents, mask, sinks)
        kernel.backward(do, q, k, v, guarded(o), guarded(lse), documents, mask, sinks)


@pytest.mark.parametrize("far", ["tokens", "heads"])
def test_more_than_two_to_the_31_elements(place, far):
    call = richest(place)._replace(lengths=(1, 2))
    near, sinks, documents, mask = tensors_of(place, call, (3, 3, 16), BF16)
    sinks = None if sinks is None else sinks.new_ones(3)
    kernel = kernel_of(place.backend)
    with contextlib.ExitStack() as memory:

        def spread(tensor):
            """The same with its tokens, or its heads, so far apart that the third begins past
            2^31 elements."""
            sparse = testing.sparse_rows(3, 48, 2**30 + 7, BF16)
            rows = memory.enter_context(sparse).unflatten(1, (3, 16))
            return (rows if far == "tokens" else rows.transpose(0, 1)).copy_(tensor)

        found = []
        for q, k, v, do in (near, [spread(tensor) for tensor in near]):
            o, lse = kernel.forward(q, k, v, documents, mask, sinks)
            found.append([o, lse, *kernel.backward(do, q, k, v, o, lse, documents, mask, sinks)])
        assert same_bits(*found)


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["q", "k", "v", "sinks"])
def test_only_what_wants_a_gradient_gets_one(place, wanted):
    call = richest(place)
    if wanted == "sinks" and call.sinks is None:
        pytest.skip(f"{place.backend} serves no sinks")
    leaves = leaves_of(place, (2, 1, 16), call)
    full = results(place, leaves, call)[1:]
    given = [None if t is None else t.detach() for t in leaves]
    given["qkvs".index(wanted[0])].requires_grad_()
    o = attend(place, given, call)
    o.backward(upstream(o))
    for name, leaf, expected in zip("qkvs", given, full, strict=False):
        assert torch.equal(leaf.grad, expected) if name == wanted[0] else leaf.grad is None


def test_a_second_backward_gives_the_same(place):
    """Even where the first one's results have been changed."""
    call = richest(place)
    leaves = leaves_of(place, (2, 1, 16), call)
    wanted = [leaf for leaf in leaves if leaf is not None]
    out = attend(place, leaves, call).square().sum()
    first = torch.autograd.grad(out, wanted, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.mul_(3)
    assert same_bits(kept, torch.autograd.grad(out, wanted))


def test_a_gradient_of_a_gradient_is_refused():
    leaves = leaves_of(EAGER, (2, 1, 16), PLAIN)
    with pytest.raises(RuntimeError, match="packed_attention is differentiable once"):
        torch.autograd.grad(attend(EAGER, leaves, PLAIN).sum(), leaves[0], create_graph=True)


def test_an_output_changed_in_place_is_noticed():
    """The backward pass needs it as it was."""
    o = attend(EAGER, leaves_of(EAGER, (2, 1, 16), PLAIN), PLAIN)
    o *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_one_tensor_may_be_query_key_and_value(place):
    call = PLAIN
    q, *_ = leaves_of(place, (2, 2, 16), call)
    apart = results(place, (q, q, q, None), call)
    shared = q.detach().clone().requires_grad_()
    o = attend(place, (shared, shared, shared, None), call)
    o.backward(upstream(o))
    assert torch.equal(o, apart[0])
    torch.testing.assert_close(shared.grad, sum(apart[1:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(place, reentrant):
    call = richest(place)
    leaves = leaves_of(place, (2, 1, 16), call)

    def block(*leaves):
        return torch.tanh(attend(place, leaves, call)).sum()

    wanted = [leaf for leaf in leaves if leaf is not None]
    plain = torch.autograd.grad(block(*leaves), wanted)
    checkpoint(block, *leaves, use_reentrant=reentrant).backward()
    assert same_bits(plain, [leaf.grad for leaf in wanted])


def test_without_a_graph(place):
    call = richest(place)
    leaves = leaves_of(place, (2, 1, 16), call)
    o = attend(place, leaves, call)
    with torch.inference_mode():
        assert torch.equal(attend(place, leaves, call), o)
    with torch.no_grad():
        assert not attend(place, leaves, call).requires_grad


def test_inputs_stay_as_they_were(place):
    call = richest(place)
    leaves = leaves_of(place, (2, 1, 16), call)
    kept = copies(leaves)
    o = attend(place, leaves, call)
    stored, do = o.detach().clone(), upstream(o)
    o.backward(do)
    assert torch.equal(o, stored) and torch.equal(do, upstream(o))
    pairs = zip(leaves, kept, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs if one is not None)
