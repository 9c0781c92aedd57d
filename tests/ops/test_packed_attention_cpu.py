"""The C++ backend of packed_attention where its blocks and tasks end: of 96 queries, of 96 or 192
keys, of 1152 queries that one thread takes."""

import pytest
import torch
from fasttrain_kernels.dispatch import choose
from ops.attention_calls import (
    BF16,
    CPU,
    EAGER,
    F32,
    F64,
    Attention,
    assert_exact,
    leaves_of,
    results,
    upstream,
)
from ops.rms_norm_calls import same_bits

TASK = 1152


@pytest.mark.parametrize("window", [None, 1, 97, 192], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_where_blocks_end(causal, window):
    lengths = (95, 96, 97, 193, 289) if causal else (96, 97, 193)
    assert_exact(CPU, (2, 1, 9), Attention(lengths, causal, window))


@pytest.mark.parametrize(
    "call",
    [
        Attention((TASK + 1,)),
        Attention((3, TASK + 97), window=70, softcap=4.0),
        Attention((TASK + 5,), causal=False, window=250, sinks=torch.tensor([0.5])),
    ],
    ids=["causal", "window", "both sides"],
)
def test_a_document_of_several_tasks(call):
    assert_exact(CPU, (1, 1, 8), call)


def test_a_long_document_gives_the_same_bits_alone_and_on_any_number_of_threads():
    call = Attention((5, 2 * TASK + 100), window=300)
    leaves = leaves_of(CPU, (2, 1, 8), call)
    own = tuple(None if t is None else t[5:].detach().requires_grad_() for t in leaves)
    do = upstream(leaves[0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(CPU, leaves, call, do)
        torch.set_num_threads(5)
        five = results(CPU, leaves, call, do)
        alone = results(CPU, own, call._replace(lengths=call.lengths[1:]), do[5:])
    finally:
        torch.set_num_threads(threads)
    assert same_bits(one, five)
    assert same_bits([t[5:] for t in one], alone)


def test_queries_of_a_group_share_what_was_packed():
    assert_exact(CPU, (6, 2, 16, 5), Attention((100, 200)), BF16)


@pytest.mark.parametrize(("dtype", "sink"), [(F32, 89.0), (F64, 1000.0)], ids=["fp32", "fp64"])
def test_a_sink_whose_exp_overflows(dtype, sink):
    """Every weight is then all but 0, and lanes past the last token must add nothing."""
    call = Attention((5,), sinks=torch.tensor([sink]))
    leaves = leaves_of(CPU, (1, 1, 8), call, dtype)
    for one, other in zip(results(CPU, leaves, call), results(EAGER, leaves, call), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-30)


def test_says_what_it_does_not_serve():
    facts = {"head_dim": 64, "query_heads": 2, "key_heads": 1}
    row = choose("packed_attention", device="cpu", dtype=torch.float16, **facts)
    assert ("cpu", "serves float32, float64, bfloat16, not float16") in [
        (rejection.backend, rejection.reason) for rejection in row.rejected
    ]
    assert choose("packed_attention", device="cpu", dtype=F32, **facts).backend == "cpu"
