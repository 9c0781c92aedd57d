"""packed_attention inside PyTorch: op checks, the compiler, autocast; what is refused."""

import re

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import DocumentLayout, UnsupportedKernel, packed_attention, use
from fasttrain_kernels.ops.packed_attention import op
from ops.attention_calls import (
    BF16,
    CPU,
    EAGER,
    F16,
    F32,
    F64,
    SINKS,
    Attention,
    attend,
    kernel_of,
    leaves_of,
    offsets_of,
    results,
    same_bits,
    upstream,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

# ---- PyTorch's machinery ------------------------------------------------------------------------


def arguments(leaves, call, backend, layout):
    """Of the opaque forward op."""
    *heads, sinks = (None if t is None else t.detach() for t in leaves)
    offsets = offsets_of(call, heads[0].device)
    pair = (offsets.cpu(), None) if layout is None else (layout.offsets, layout.tiles)
    scale = heads[0].shape[2] ** -0.5 if call.scale is None else call.scale
    options = (call.causal, call.window, call.softcap)
    return (*heads, offsets, *pair, *options, sinks, scale, backend)


@pytest.mark.parametrize("options", [{}, {"window": 4, "softcap": 2.0, "sinks": SINKS[:2]}])
def test_opcheck(place, options):
    """What a backend decides: strides, aliases, what is written to. The rest is checked once."""
    checks = ("test_schema", "test_faketensor")
    if place.backend == "eager" and options:
        checks = (*checks, "test_autograd_registration", "test_aot_dispatch_dynamic")
    for lengths, with_layout in (((3, 0, 5), True), ((), False)):
        call = Attention(lengths, **options)
        leaves = leaves_of(place, (2, 1, 16), call)
        layout = DocumentLayout(call.lengths).to(leaves[0].device) if with_layout else None
        forward = arguments(leaves, call, place.backend, layout)
        opcheck(torch.ops.fasttrain.packed_attention_forward.default, forward, test_utils=checks)
        o, lse = torch.ops.fasttrain.packed_attention_forward(*forward)
        backward = (upstream(o), *forward[:3], o, lse, *forward[3:])
        opcheck(torch.ops.fasttrain.packed_attention_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize(
    ("backend", "with_layout"), [("eager", True), ("eager", False), ("cpu", True)]
)
def test_torch_compile_in_one_graph(backend, with_layout):
    """For other numbers of documents and tokens there is at most one more."""

    def block(q, k, v, offsets, layout):
        named = {"layout": layout, "backend": backend}
        o = packed_attention(torch.sin(q), k, v, offsets, **named)
        return packed_attention(o, k, v, offsets, scale=0.5, **named) + q

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((3, 4), (2, 0, 5, 1), (9,)):
        call = Attention(lengths)
        leaves = leaves_of(CPU._replace(backend=backend), (2, 2, 16), call)[:3]
        layout = DocumentLayout(lengths) if with_layout else None
        plain, found = (each(*leaves, offsets_of(call), layout) for each in (block, compiled))
        grads = [torch.autograd.grad(out, leaves, upstream(plain)) for out in (plain, found)]
        assert torch.equal(plain, found) and same_bits(*grads)
    assert counter.frame_count <= 2


def test_options_under_torch_compile():
    """A window, a softcap and a scale may be symbols of the graph."""
    torch._dynamo.reset()

    def block(q, k, v, offsets, sinks, window, softcap, scale):
        options = {"window": window, "softcap": softcap, "scale": scale, "sinks": sinks}
        return packed_attention(q, k, v, offsets, backend="eager", **options)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for window, softcap, scale in ((3, 2.0, 0.5), (5, 4.0, -0.7)):
        call = Attention((7, 2), True, window, softcap, SINKS, scale)
        *heads, sinks = leaves_of(EAGER, (4, 2, 16), call)
        plain, found = (
            each(*heads, offsets_of(call), sinks, window, softcap, scale)
            for each in (block, compiled)
        )
        grads = [torch.autograd.grad(out.sum(), (*heads, sinks)) for out in (plain, found)]
        assert torch.equal(plain, found) and same_bits(*grads)


def test_a_compiled_graph_follows_use():
    call = Attention((3, 4))
    leaves = leaves_of(EAGER, (2, 1, 16), call)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, offsets: packed_attention(q, k, v, offsets),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(*leaves[:3], offsets_of(call))
    with use(packed_attention="varlen"), pytest.raises(UnsupportedKernel, match=r"'varlen'.*use"):
        compiled(*leaves[:3], offsets_of(call))
    compiled(*leaves[:3], offsets_of(call))


@pytest.mark.parametrize(
    "dtypes", [(F32, F32, F32), (BF16, F32, F32), (F64, F64, F64), (F16, F16, F32)], ids=str
)
def test_autocast_casts_as_for_torchs_own(place, dtypes):
    call = Attention((20,))
    leaves_of(place, (2, 2, 16), call, F64 if F64 in dtypes else BF16)
    q, k, v = (
        leaf.detach().to(dtype).requires_grad_()
        for leaf, dtype in zip(leaves_of(place, (2, 2, 16), call)[:3], dtypes, strict=True)
    )
    with torch.autocast(place.device, BF16):
        o = attend(place, (q, k, v, None), call)
        heads = (leaf.transpose(0, 1)[None] for leaf in (q, k, v))
        theirs = F.scaled_dot_product_attention(*heads, is_causal=True)
    assert o.dtype == theirs.dtype == (F64 if F64 in dtypes else BF16)
    torch.testing.assert_close(o, theirs[0].transpose(0, 1), rtol=2**-6, atol=2**-6)
    o.sum().backward()
    assert [leaf.grad.dtype for leaf in (q, k, v)] == list(dtypes)


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0, "sinks": SINKS[:2]}])
def test_given_a_layout_no_value_is_read(options):
    """So that nothing waits for a GPU: tensors of the meta device have no values to wait for."""
    call = Attention((3, 0, 5), **options)
    heads = [torch.empty(8, heads, 16, device="meta") for heads in (2, 1, 1)]
    sinks = None if call.sinks is None else call.sinks.to("meta")
    layout = DocumentLayout(call.lengths).to(torch.device("meta"))
    forward = arguments((*heads, sinks), call, "eager", layout)
    o, lse = op._forward(*forward)
    gradients = op._backward(o, *forward[:3], o, lse, *forward[3:])
    assert [g.shape for g in gradients[:3]] == [t.shape for t in heads]
    with pytest.raises(NotImplementedError, match="out of meta"):
        op._forward(*arguments((*heads, sinks), call, "eager", None))


def test_a_layout_given_or_not_gives_the_same(place):
    call = Attention((3, 0, 129, 5))
    leaves = leaves_of(place, (2, 1, 16), call)
    assert same_bits(results(place, leaves, call), results(place, leaves, call, layout=None))


# ---- refusals -----------------------------------------------------------------------------------


def rows(*shape, **options):
    return torch.ones(*shape, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": rows(6, 16)}, r"expected q \(T, Hq, D\), k, v \(T, Hk, \.\.\.\); got q \(6, 16\)"),
        ({"v": rows(6, 1, 16)}, r"expected q .* got q .*, k \(6, 2, 16\), v \(6, 1, 16\)"),
        ({"v": rows(5, 2, 16)}, r"expected q .* v \(5, 2, 16\)"),
        ({"q": rows(5, 4, 16)}, r"q and k must agree in tokens and width; got q \(5, 4, 16\)"),
        ({"q": rows(6, 4, 8)}, r"q and k must agree in tokens and width; got q \(6, 4, 8\)"),
        ({"v": rows(6, 2, 0)}, r"heads and widths must not be 0; got .*v \(6, 2, 0\)"),
        ({"q": rows(6, 3, 16)}, "3 query heads can't share 2 key heads equally"),
        ({"q": rows(6, 4, 16, dtype=torch.int64)}, "q is int64; expected one of float32"),
        ({"sinks": torch.ones(4, dtype=torch.int32)}, "sinks is int32; expected one of"),
        ({"k": rows(6, 2, 16, dtype=BF16)}, "must be of one dtype; got float32, bfloat16, float32"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"must be int32 \(docs \+ 1,\); got int64 \(2,\)"),
        ({"cu_seqlens": torch.ones(1, 2, dtype=torch.int32)}, r"got int32 \(1, 2\)"),
        ({"cu_seqlens": torch.ones(0, dtype=torch.int32)}, r"got int32 \(0,\)"),
        ({"cu_seqlens": torch.ones(2, dtype=torch.int32, device="meta")}, "must be on one device"),
        ({"window": 0}, "window=0; it counts the keys"),
        ({"window": 2.5}, "window=2.5; it counts the keys"),
        ({"softcap": -1.0}, "softcap=-1.0 must be positive"),
        ({"softcap": float("nan")}, "softcap=nan must be positive"),
        ({"scale": float("inf")}, "scale=inf must be finite"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"sinks": torch.ones(2)}, r"sinks \(2,\) must be \(Hq,\) = \(4,\)"),
        ({"backend": "cda"}, "packed_attention='cda'; expected one of auto, triton, cpu, flash"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    named = {"q": rows(6, 4, 16), "k": rows(6, 2, 16), "v": rows(6, 2, 16)}
    named |= {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32), **change}
    with pytest.raises(ValueError, match=message):
        packed_attention(**named)


@pytest.mark.parametrize(
    ("offsets", "shown"),
    [
        ([0, 4, 3, 6], "[0, 4, 3, 6]"),
        ([1, 6], "[1, 6]"),
        ([0, 5], "[0, 5]"),
        ([0, 7], "[0, 7]"),
        ([0], "[0]"),
        ([0, -1, 6], "[0, -1, 6]"),
        ([*range(12), 7], "[0, 1, 2, 3, 4, 5, ..., 7] (13 values)"),
    ],
)
def test_refuses_offsets_that_do_not_rise_to_the_last_token(place, offsets, shown):
    kernel_of(place.backend)
    q, device = torch.ones(6, 1, 16, device=place.device), place.device
    given = torch.tensor(offsets, dtype=torch.int32, device=device)
    message = f"packed_attention: cu_seqlens must rise from 0 to T = 6; got {shown}"
    with pytest.raises(ValueError, match=re.escape(message)):
        packed_attention(q, q, q, given, backend=place.backend)


@pytest.mark.parametrize("lengths", [(3, 2), (2, 4), (6, 0)])
def test_refuses_a_layout_of_other_documents(lengths):
    q, offsets = torch.ones(6, 1, 16), torch.tensor([0, 6], dtype=torch.int32)
    message = r"layout and cu_seqlens are of different documents; layout: \[0.*cu_seqlens: \[0, 6\]"
    with pytest.raises(ValueError, match=message):
        packed_attention(q, q, q, offsets, layout=DocumentLayout(lengths), backend="eager")


def test_refuses_a_layout_elsewhere():
    q = torch.ones(6, 1, 16, device="meta")
    offsets = torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises(
        ValueError, match=r"layout is on cpu, q on meta; give layout.to\(q.device\)"
    ):
        packed_attention(q, q, q, offsets, layout=DocumentLayout((6,)))


def test_a_backend_asked_for_by_name_never_falls_back():
    call = Attention((3, 4))
    leaves = leaves_of(EAGER, (2, 1, 16), call)
    with pytest.raises(UnsupportedKernel, match=r"'flash-attn', .*These can: .*eager"):
        attend(CPU._replace(backend="flash-attn"), leaves, call)
