"""packed_attention: each backend against exact values, and properties.

Edges are in test_packed_attention_edges.py, the compiler, contexts and refusals in
test_packed_attention_in_torch.py; test_interpreter.py runs all on Triton's interpreter, where a
program takes milliseconds: hence few tiles a test.
"""

import functools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels.ops.packed_attention import self_test
from fasttrain_kernels.testing_attention import packed_attention_expected
from hypothesis import given, settings
from ops.attention_calls import (
    BF16,
    CPU,
    EAGER,
    F16,
    F32,
    F64,
    SINKS,
    Attention,
    assert_exact,
    attend,
    copies,
    kernel_of,
    leaves_of,
    results,
    richest,
    same_bits,
    upstream,
)
from ops.loss_calls import use_instruction_set

# ---- 1. each backend against exact values --------------------------------------------------------

# name: (query heads, key heads, width of keys[, of values]), call
CASES = {
    "one tile more or less": ((1, 1, 64), Attention((127, 128, 129))),
    "one token beside many": ((2, 1, 16), Attention((1, 140, 1))),
    "one document": ((1, 1, 64), Attention((150,))),
    "one token": ((2, 2, 16), Attention((1,))),
    "one token each": ((2, 1, 16), Attention((1,) * 9)),
    "none between": ((4, 2, 16), Attention((0, 7, 0, 0, 40, 0))),
    "width 80, one key head": ((3, 1, 80), Attention((33, 1, 7))),
    "width 128": ((1, 1, 128), Attention((70, 5))),
    "width 256": ((1, 1, 256), Attention((33, 3))),
    "an odd width": ((2, 1, 19), Attention((20, 9))),
    "wider values": ((2, 1, 24, 40), Attention((40, 6))),
    "narrower values": ((2, 2, 40, 8), Attention((12, 29))),
    "full": ((2, 1, 32), Attention((30, 1, 131), causal=False)),
    "window 1": ((2, 1, 16), Attention((5, 30, 1), window=1)),
    "window 1, both sides": ((2, 1, 16), Attention((5, 30, 1), causal=False, window=1)),
    "window": ((2, 1, 32), Attention((200, 3), window=40)),
    "window of a tile": ((1, 1, 16), Attention((260,), window=128)),
    "window, both sides": ((1, 1, 16), Attention((140, 3), causal=False, window=9)),
    "window wider than documents": ((2, 1, 16), Attention((20, 30), window=1000)),
    "softcap": ((2, 1, 32), Attention((40, 5), softcap=2.0)),
    "sinks": ((4, 2, 32), Attention((40, 1, 5), sinks=SINKS)),
    "a sink of -inf is none": (
        (2, 1, 16),
        Attention((260,), window=20, sinks=torch.tensor([-torch.inf, 0.5])),
    ),
    "negative scale": ((2, 1, 32), Attention((40, 5), scale=-0.3)),
    "peaked": ((2, 1, 32), Attention((40, 5), scale=4.0)),
    "scale zero": ((2, 1, 16), Attention((9, 5), scale=0.0)),
    "everything": (
        (2, 1, 40),
        Attention((20, 130), window=64, softcap=5.0, sinks=SINKS[2:], scale=-0.5),
    ),
    "everything, both sides": (
        (4, 2, 16),
        Attention((20, 9), causal=False, window=7, softcap=5.0, sinks=SINKS, scale=0.5),
    ),
}


# In every dtype in the interpreter too, which otherwise runs them in float32.
IN_EVERY_DTYPE = ("one token each", "everything, both sides", "width 80, one key head")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_exact_values(place, case, dtype):
    if place.truncating and dtype != F32 and case not in IN_EVERY_DTYPE:
        pytest.skip("the interpreter would take long")
    shape, call = CASES[case]
    assert_exact(place, shape, call, dtype)


@pytest.mark.parametrize("case", ["none between", "wider values", "everything"])
def test_float64_is_computed_in_float64(place, case):
    shape, call = CASES[case]
    assert_exact(place, shape, call, F64)


@functools.cache
def a_thousand_documents():
    """Leaves and call, and what eager makes of them."""
    generator = torch.Generator().manual_seed(0)
    call = Attention(tuple(torch.randint(0, 6, (1000,), generator=generator).tolist()))
    leaves = leaves_of(EAGER, (2, 1, 16), call)
    return leaves, call, results(EAGER, leaves, call)


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_a_thousand_documents(backend):
    kernel_of(backend)
    leaves, call, expected = a_thousand_documents()
    found = results(CPU._replace(backend=backend), leaves, call)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_self_test_passes(place):
    if place.truncating:
        pytest.skip("the interpreter would take long; the cases above are like it")
    kernel = kernel_of(place.backend)
    parity = self_test.parity(kernel, torch.device(place.device))
    assert parity <= 1
    if place.device == "cpu":  # elsewhere, what serves needs a package that may be missing
        assert parity > 0


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_in_float64(backend, causal):
    kernel_of(backend)
    call = Attention((4, 1, 0, 2), causal, 3, 2.0, torch.tensor([0.5, -1.0], dtype=F64), -0.7)
    place = CPU._replace(backend=backend)
    leaves = leaves_of(place, (2, 1, 3, 2), call, F64)
    assert torch.autograd.gradcheck(lambda *leaves: attend(place, leaves, call), leaves)


@pytest.mark.parametrize("causal", [True, False])
def test_one_document_is_what_torch_computes(place, causal):
    call = Attention((70,), causal)
    leaves = leaves_of(place, (4, 2, 32), call)
    o = attend(place, leaves, call)
    q, k, v = (leaf.transpose(0, 1)[None] for leaf in leaves[:3])
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    theirs = theirs[0].transpose(0, 1)
    torch.testing.assert_close(o, theirs, rtol=1e-5, atol=1e-5)
    do = upstream(o)
    ours, theirs = (torch.autograd.grad(out, leaves[:3], do) for out in (o, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sinks_softcap_and_window_are_what_transformers_computes():
    from transformers.masking_utils import sliding_window_overlay
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss

    length, window = 30, 7
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = (j <= i) & sliding_window_overlay(window)(0, 0, i, j)
    mask = torch.zeros(length, length).masked_fill(~seen, float("-inf"))[None, None]
    for sinks, softcap in ((SINKS, None), (None, 2.0)):
        call = Attention((length,), window=window, softcap=softcap, sinks=sinks, scale=0.7)
        leaves = leaves_of(EAGER, (4, 2, 16), call)
        module = torch.nn.Module()
        module.num_key_value_groups, module.sinks, module.training = 2, sinks, False
        heads = [leaf.transpose(0, 1)[None] for leaf in leaves[:3]]
        if softcap is None:
            theirs = modeling_gpt_oss.eager_attention_forward(module, *heads, mask, scaling=0.7)
        else:
            theirs = modeling_gemma2.eager_attention_forward(
                module, *heads, mask, scaling=0.7, softcap=softcap
            )
        ours = attend(EAGER, leaves, call)
        torch.testing.assert_close(ours, theirs[0][0], rtol=1e-5, atol=1e-5)


def test_no_worse_than_torch_in_bf16(place):
    call = Attention((130,))
    leaves = leaves_of(place, (2, 2, 64), call, BF16)[:3]
    o = attend(place, (*leaves, None), call)
    do = upstream(o)
    q, k, v = (leaf.transpose(0, 1)[None] for leaf in leaves)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    exact = packed_attention_expected(*leaves, call, do=do)
    error = [
        [
            float((found.detach().double().cpu() - exact[name].value).norm())
            for name, found in zip(
                ("o", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, do)), strict=True
            )
        ]
        for out in (o, theirs)
    ]
    # Rounding towards zero, as the interpreter stores bfloat16, is twice as far off.
    allowed = 4 if place.truncating else 2
    assert all(ours <= allowed * torchs for ours, torchs in zip(*error, strict=True)), error


# ---- 2. properties ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20) | st.integers(60, 70), max_size=6),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([F32, BF16]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 30),
    softcap=st.none() | st.just(3.0),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_batch_on_the_cpu(
    lengths, heads, widths, dtype, causal, window, softcap, has_sinks, seed
):
    sinks = SINKS[: heads[0]] if has_sinks else None
    call = Attention(tuple(lengths), causal, window, softcap, sinks)
    assert_exact(CPU, (*heads, *widths), call, dtype, seed)


def of_document(tensor, call, index):
    """The tokens of one document."""
    begin = sum(call.lengths[:index])
    return tensor[begin : begin + call.lengths[index]]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_document_alone_equals_the_document_among_others(place, dtype):
    lengths = (37, 0, 6, 129) if dtype == F32 else (37, 0, 6)
    call = richest(place)._replace(lengths=lengths, sinks=None)
    leaves = leaves_of(place, (2, 1, 16), call, dtype)
    do = upstream(leaves[0])
    together = results(place, leaves, call, do)
    for index, length in enumerate(call.lengths):
        if length == 0:
            continue
        one = tuple(None if t is None else of_document(t, call, index) for t in leaves)
        alone = results(place, one, call._replace(lengths=(length,)), of_document(do, call, index))
        among = [of_document(t, call, index) for t in together]
        if place.backend in ("cpu", "eager") or place == ("triton", "cuda"):
            assert same_bits(alone, among)
        else:  # not ours, or a product of the interpreter's, where numpy decides the order
            limits = {F32: 1e-5, BF16: 2**-6}
            for a, b in zip(alone, among, strict=True):
                torch.testing.assert_close(a, b, rtol=limits[dtype], atol=limits[dtype])


@pytest.mark.parametrize("change", ["other numbers", "nan", "inf"])
@pytest.mark.parametrize("changed", [1, 3])
def test_what_a_neighbour_holds_changes_no_bit(place, changed, change):
    """Neither where documents share a tile nor where their tiles meet; not even 0 * NaN."""
    call = Attention((3, 5, 129, 40, 1))
    leaves = leaves_of(place, (1, 1, 16), call)
    do = upstream(leaves[0])
    before = results(place, leaves, call, do)
    other, other_do = copies(leaves), do.clone()
    value = {"nan": torch.nan, "inf": torch.inf}.get(change)
    with torch.no_grad():
        for tensor in (*other[:3], other_do):
            part = of_document(tensor, call, changed)
            part.copy_(part * 3 + 1 if value is None else torch.full_like(part, value))
    after = results(place, other, call, other_do)
    for index in set(range(len(call.lengths))) - {changed}:
        for a, b in zip(before, after, strict=True):
            assert torch.equal(of_document(a, call, index), of_document(b, call, index))


def test_what_is_not_seen_changes_no_bit(place):
    """A later token leaves earlier queries as they were."""
    call = Attention((9, 40))
    leaves = leaves_of(place, (2, 1, 16), call)
    other = copies(leaves)
    with torch.no_grad():
        for tensor in other[:3]:
            tensor[30:] = 50 - tensor[30:]
    before, after = (attend(place, each, call)[:30] for each in (leaves, other))
    assert torch.equal(before, after)


def test_is_bitwise_repeatable(place):
    call = richest(place)._replace(lengths=(1, 20) if place.truncating else (1, 140, 20))
    leaves = leaves_of(place, (2, 1, 16), call)
    first = results(place, leaves, call)
    assert all(
        same_bits(first, results(place, leaves, call)) for _ in range(2 if place.truncating else 10)
    )


def test_the_number_of_threads_changes_no_bit():
    call = Attention((1, 300, 0, 40, 129, 2), softcap=5.0, sinks=SINKS)
    leaves = leaves_of(CPU, (4, 2, 32), call)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(CPU, leaves, call))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    kernel_of("cpu")
    use_instruction_set(isa)
    try:
        for case in ("width 80, one key head", "an odd width", "everything"):
            for dtype in (F32, BF16):
                assert_exact(CPU, *CASES[case], dtype)
        assert_exact(CPU, *CASES["everything, both sides"], F64)
    finally:
        torch.ops.fasttrain_native.set_cpu_isa("auto")


def test_a_query_that_sees_one_key_takes_its_value(place):
    call = Attention((5, 30, 1), window=1)
    leaves = leaves_of(place, (2, 1, 16), call)
    o = attend(place, leaves, call)
    assert torch.equal(o, leaves[2].expand_as(o))
