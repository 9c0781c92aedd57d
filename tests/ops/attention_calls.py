"""Calls of packed_attention that its tests make: inputs, exact values, comparisons of bits."""

import importlib.util

import pytest
import torch
from fasttrain_kernels import DocumentLayout, packed_attention
from fasttrain_kernels.ops.packed_attention.op import PACKED_ATTENTION, describe
from fasttrain_kernels.testing_attention import Attention, packed_attention_expected
from ops.conftest import Place
from ops.rms_norm_calls import BF16, F32, F64, same_bits

__all__ = ["BF16", "F32", "F64", "Attention", "same_bits"]

F16 = torch.float16
CPU, EAGER = Place("cpu", "cpu"), Place("eager", "cpu")
LENGTHS = (3, 0, 40, 1)
SINKS = torch.tensor([-1.0, 0.0, 2.0, 12.0])  # the last outweighs every score


def kernel_of(backend):
    """The module that implements a backend. Skips the test where it isn't part of the package."""
    candidate = PACKED_ATTENTION.candidate(backend)
    if importlib.util.find_spec(candidate.module) is None:
        pytest.skip(f"there is no {candidate.module}")
    kernel = candidate.load()
    assert not isinstance(kernel, str), kernel
    return kernel


def problem_of(leaves, call, document_length=64):
    """What decides whether a backend can serve a call of these leaves."""
    q, k, v, _ = leaves
    return describe(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        query_heads=q.shape[1],
        key_heads=k.shape[1],
        causal=call.causal,
        window=call.window is not None,
        softcap=call.softcap is not None,
        sinks=call.sinks is not None,
        document_length=document_length,
    )


def leaves_of(place, shape, call, dtype=F32, seed=0):
    """q, k, v and, where the call has some, sinks, which want gradients; `shape`: query heads, key
    heads, width, and the values' width where it differs. Skips the test where the backend has a
    reason not to serve the call."""
    query_heads, key_heads, width, *rest = shape
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        drawn = torch.randn(sum(call.lengths), *shape, generator=generator)
        return drawn.to(place.device, dtype).requires_grad_()

    q, k = leaf(query_heads, width), leaf(key_heads, width)
    v = leaf(key_heads, *(rest or [width]))
    sinks = None if call.sinks is None else call.sinks.clone().to(place.device).requires_grad_()
    reason = kernel_of(place.backend).unsupported(problem_of((q, k, v, sinks), call))
    if reason is not None:
        pytest.skip(reason)
    return q, k, v, sinks


def richest(place):
    """A call with a window, a softcap, sinks and a scale, or with as many as the backend serves."""
    everything = Attention(LENGTHS, True, 9, 3.0, SINKS[:2], -0.4)
    heads = [torch.empty(1, n, 16, device=place.device) for n in (2, 1, 1)]
    for call in (everything, everything._replace(sinks=None)):
        if kernel_of(place.backend).unsupported(problem_of((*heads, None), call)) is None:
            return call
    return Attention(LENGTHS)


def offsets_of(call, device="cpu"):
    """cu_seqlens of a call's documents."""
    return DocumentLayout(call.lengths).offsets.to(device)


def attend(place, leaves, call, **options):
    """packed_attention of leaves on a place, with the layout unless `layout` says otherwise."""
    q, k, v, sinks = leaves
    device = torch.device(place.device)
    layout = options.pop("layout", DocumentLayout(call.lengths).to(device))
    named = {"causal": call.causal, "window": call.window, "softcap": call.softcap}
    return packed_attention(
        q,
        k,
        v,
        options.pop("cu_seqlens", offsets_of(call, device)),
        layout=layout,
        sinks=sinks,
        scale=call.scale,
        backend=place.backend,
        **named,
        **options,
    )


def upstream(o, seed=1):
    """A gradient of the output: any numbers, not 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(o.shape, generator=generator).to(o)


def copies(leaves):
    """Leaves of their own, with the same values."""
    return tuple(None if t is None else t.detach().clone().requires_grad_() for t in leaves)


def results(place, leaves, call, do=None, **options):
    """o and all gradients of one call, for comparisons of bits."""
    leaves = copies(leaves)
    o = attend(place, leaves, call, **options)
    o.backward(upstream(o) if do is None else do)
    return [o.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def assert_exact(place, shape, call, dtype=F32, seed=0):
    """Forward, lse and all gradients of one call are within what their roundings allow."""
    leaves = leaves_of(place, shape, call, dtype, seed)
    q, k, v, sinks = leaves
    o = attend(place, leaves, call)
    lse = o.grad_fn.saved_tensors[4]
    do = upstream(o)
    o.backward(do)
    assert o.dtype == dtype and lse.dtype == (F64 if dtype == F64 else F32)
    expected = packed_attention_expected(q, k, v, call, do=do, o=o, truncating=place.truncating)
    found = {"o": o, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if sinks is not None:
        assert sinks.grad.dtype == sinks.dtype
        found["dsinks"] = sinks.grad
    for name, tensor in found.items():
        assert name in ("lse", "dsinks") or tensor.dtype == dtype
        ratio = expected[name].ratio(tensor)
        assert ratio <= 1, f"{name} is {ratio:.3g} times as far off as is allowed"
