"""Small fixed problems on which a backend of packed_attention is compared with exact values."""

from types import ModuleType

import torch

from fasttrain_kernels.layout import DocumentLayout
from fasttrain_kernels.ops.packed_attention.op import describe
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask
from fasttrain_kernels.testing_attention import Attention, packed_attention_expected

# Documents: one token, none, several that share a tile, one of two tiles.
LENGTHS = (1, 0, 5, 60, 130, 3)
# Query heads, key heads, width, causal, window, softcap, sinks.
CALLS = (
    (2, 2, 64, True, None, None, False),
    (4, 2, 32, True, 40, None, False),
    (3, 1, 40, True, None, 20.0, False),
    (2, 1, 16, False, None, None, True),
)
# Each call in some: on a GPU each pair has three kernels to compile.
DTYPES = {torch.float32: CALLS[::2], torch.bfloat16: CALLS, torch.float16: CALLS[:1]}


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error of forward and backward in units of what is allowed: right is at most 1.

    Covers what `kernel` serves of these dtypes and calls.
    """
    worst = 0.0
    for dtype, calls in DTYPES.items():
        for query_heads, key_heads, width, causal, window, softcap, has_sinks in calls:
            problem = describe(
                device=device,
                dtype=dtype,
                head_dim=width,
                query_heads=query_heads,
                key_heads=key_heads,
                causal=causal,
                window=window is not None,
                softcap=softcap is not None,
                sinks=has_sinks,
                document_length=100,
            )
            if kernel.unsupported(problem) is None:
                sinks = torch.tensor([0.5] * query_heads) if has_sinks else None
                call = Attention(LENGTHS, causal, window, softcap, sinks)
                shape = (query_heads, key_heads, width)
                worst = max(worst, _one(kernel, device, dtype, shape, call, truncating))
    return worst


def _one(
    kernel: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    call: Attention,
    truncating: bool,
) -> float:
    query_heads, key_heads, width = shape
    generator = torch.Generator().manual_seed(width)
    heads = (query_heads, key_heads, key_heads, query_heads)
    q, k, v, do = (
        torch.randn(sum(call.lengths), n, width, generator=generator).to(device, dtype)
        for n in heads
    )
    layout = DocumentLayout(call.lengths).to(device)
    documents = Documents(layout.offsets.to(device), layout.offsets, layout.tiles)
    mask = Mask(call.causal, call.window, call.softcap, width**-0.5)
    sinks = None if call.sinks is None else call.sinks.to(device)
    o, lse = kernel.forward(q, k, v, documents, mask, sinks)
    dq, dk, dv, dsinks = kernel.backward(do, q, k, v, o, lse, documents, mask, sinks)
    expected = packed_attention_expected(q, k, v, call, do=do, o=o, truncating=truncating)
    found = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}
    return max(expected[name].ratio(found[name]) for name in found)
