"""linear_cross_entropy: each backend against exact values, and properties.

Edge cases and refusals are in test_linear_cross_entropy_edges.py, autograd and the compiler in
test_linear_cross_entropy_in_torch.py; test_interpreter.py runs all on Triton's interpreter.
"""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import linear_cross_entropy
from fasttrain_kernels.ops.cross_entropy.reference import Terms, outcome, targets_of
from fasttrain_kernels.ops.linear_cross_entropy import by_panels, by_rows, self_test
from fasttrain_kernels.ops.linear_cross_entropy.reference import Head, Pair
from fasttrain_kernels.testing import ROUNDOFF, Expected
from fasttrain_kernels.testing_losses import linear_cross_entropy_expected
from hypothesis import given, settings
from ops.loss_calls import (
    BF16,
    CPU,
    F32,
    F64,
    IGNORED,
    OPTIONS,
    assert_head_exact,
    assert_within,
    filled_in,
    head_call,
    head_expected,
    head_of,
    kernel_of,
    labels_of,
    loss_of,
    product_dtype,
    same_bits,
    torchs_own,
    upstream,
    use_instruction_set,
)

BOTH_WAYS = pytest.mark.parametrize("recompute", [False, True], ids=["by-rows", "by-panels"])

# ---- 1. each backend against exact values --------------------------------------------------------

# Of rows, width, classes, with a bias and an adapter: one of each, two classes, odd sizes, rows in
# two dimensions and more than a panel of Triton's interpreter.
CASES = [
    ((1,), 1, 1, False),
    ((2,), 3, 2, True),
    ((5,), 33, 127, False),
    ((2, 2), 40, 601, True),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@BOTH_WAYS
def test_matches_exact_values(place, recompute, dtype, options):
    for shape, width, classes, added in CASES:
        head = head_of(shape, width, classes, dtype, added, place.device)
        labels = labels_of(shape, classes, options.get("ignore_index", IGNORED), place.device)
        assert_head_exact(place, head, labels, recompute=recompute, **options)


@BOTH_WAYS
@pytest.mark.parametrize("classes", [32000, 151936])
def test_vocabularies_of_real_models(place, classes, recompute):
    if place.truncating and classes > 32000:
        pytest.skip("38 blocks a row take the interpreter seconds")
    labels = torch.tensor([classes - 1, IGNORED, 7], device=place.device)
    for dtype in (F32, BF16):
        head = head_of((3,), 6, classes, dtype, device=place.device)
        options = {"softcap": 30.0, "z_loss": 1e-4} if dtype == F32 else {}
        assert_head_exact(place, head, labels, recompute=recompute, **options)


@pytest.mark.parametrize("options", OPTIONS)
@BOTH_WAYS
def test_float64_is_computed_in_float64(place, recompute, options):
    if place.backend in ("triton", "cuda"):
        pytest.skip("GPU kernels compute in float32, and say so")
    labels = labels_of((9,), 67, options.get("ignore_index", IGNORED), place.device)
    head = head_of((9,), 20, 67, F64, True, place.device)
    assert_head_exact(place, head, labels, recompute=recompute, **options)


@BOTH_WAYS
def test_float16(place, recompute):
    head = head_of((5,), 33, 127, torch.float16, True, place.device)
    labels = labels_of((5,), 127, device=place.device)
    assert_head_exact(place, head, labels, recompute=recompute, num_items=3)


@BOTH_WAYS
def test_rows_that_count_may_be_named(place, recompute):
    """In any order, and others among them that don't count."""
    head = head_of((2, 5), 17, 130, F32, True, place.device)
    labels = labels_of((2, 5), 130, device=place.device)
    counting = (labels.flatten() != IGNORED).nonzero()[:, 0]
    everything = torch.arange(10, device=place.device)
    for rows in (counting, counting.flip(0), everything):
        for options in ({}, {"reduction": "none", "token_weights": True}):
            assert_head_exact(place, head, labels, rows=rows, recompute=recompute, **options)


def test_self_test_passes(place):
    kernel = kernel_of("linear_cross_entropy", place.backend)
    device = torch.device(place.device)
    assert 0 < self_test.parity(kernel, device, truncating=place.truncating) <= 1


@pytest.mark.parametrize("options", OPTIONS)
def test_the_exact_values_are_those_of_torch(options):
    labels = labels_of((20,), 31, options.get("ignore_index", IGNORED))
    options = filled_in(options, labels)
    head = head_of((20,), 12, 31, F64, added=True)
    logits = F.linear(head.hidden, head.weight, head.bias) + head.inner @ head.outer.T
    found = torchs_own(logits, labels, options)
    dloss = upstream(found["loss"])
    found["loss"].backward(dloss)
    expected = head_expected(CPU, head, labels, dloss, **options)
    gradients = {f"d{name}": gradient for name, gradient in head.gradients().items()}
    assert_within(expected, found | gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torchs_cross_entropy_of_a_linear_layer(place, reduction):
    """To what torch.testing allows float32: exact values have limits of their own above."""
    head = head_of((6,), 32, 501, device=place.device)
    labels = labels_of((6,), 501, device=place.device)
    ours = loss_of(place, head, labels, reduction=reduction)
    theirs = F.cross_entropy(F.linear(head.hidden, head.weight), labels, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    one, other = (torch.autograd.grad(loss.sum(), head.leaves()) for loss in (ours, theirs))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("options", OPTIONS)
@BOTH_WAYS
def test_gradcheck_in_float64(backend, recompute, options):
    labels = torch.tensor([3, options.get("ignore_index", IGNORED), 1])
    options = filled_in(options, labels) | {"recompute": recompute, "backend": backend}
    head = head_of((3,), 4, 5, F64, added=True)

    def loss(hidden, weight, bias, inner, outer):
        adapter = (inner, outer)
        return linear_cross_entropy(hidden, weight, labels, bias=bias, adapter=adapter, **options)

    assert torch.autograd.gradcheck(loss, head.leaves())


def test_a_bfloat16_loss_over_many_chunks_is_not_added_up_in_bfloat16():
    """Added up chunk by chunk in the dtype of the inputs, it would be off by several per cent."""
    head, labels = head_of((2048,), 24, 2000, BF16), labels_of((2048,), 2000)
    loss = loss_of(CPU, head, labels, recompute=False)
    backend, counting = kernel_of("linear_cross_entropy", "cpu").BACKEND, labels != IGNORED
    chunk = by_rows.chunk_rows(backend, int(counting.sum()), 2000, F32, torch.device("cpu"))
    assert counting.sum() > 5 * chunk
    expected = head_expected(CPU, head, labels, 1.0)["loss"]
    assert expected.ratio(loss) <= 1

    losses = loss_of(CPU, head, labels, reduction="none").detach()[counting] / counting.sum()
    narrow = torch.zeros((), dtype=BF16)
    for part in losses.split(8):
        narrow += part.sum().to(BF16)
    assert abs(float(narrow) - float(expected.value)) > 0.02 * float(expected.value)


def test_no_worse_than_torch_in_bfloat16():
    head, labels = head_of((64,), 128, 1000, BF16), labels_of((64,), 1000)
    expected = head_expected(CPU, head, labels, 1.0)
    theirs = head.copy()
    F.cross_entropy(F.linear(theirs.hidden, theirs.weight), labels).backward()
    for options in ({"recompute": False}, {"recompute": True}):
        ours = head.copy()
        loss_of(CPU, ours, labels, **options).backward()
        for name in ("hidden", "weight"):
            exact = expected[f"d{name}"].value
            error, their_error = (
                (each.gradients()[name].double() - exact).norm() for each in (ours, theirs)
            )
            assert error <= their_error


# ---- 2. properties ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([0, 1, 3, 17]),
    width=st.sampled_from([1, 8, 33]),
    classes=st.sampled_from([1, 2, 31, 257, 1024, 3001]),
    dtype=st.sampled_from([F32, BF16, F64]),
    added=st.booleans(),
    recompute=st.sampled_from([None, False, True]),
    named=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    ignore_index=st.sampled_from([-100, -1, 0, 7, 10**9]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    scale=st.sampled_from([1.0, 0.125, -2.3]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
)
def test_any_call_on_the_cpu(
    rows, width, classes, dtype, added, recompute, named, weighted, seed, **options
):
    labels = labels_of((rows,), classes, options["ignore_index"], seed=seed)
    counting = (labels != options["ignore_index"]).nonzero()[:, 0] if named else None
    options |= {"token_weights": True} if weighted else {}
    head = head_of((rows,), width, classes, dtype, added, seed=seed)
    assert_head_exact(CPU, head, labels, rows=counting, recompute=recompute, **options)


@BOTH_WAYS
def test_is_bitwise_repeatable(place, recompute):
    head = head_of((7,), 33, 403, BF16, True, place.device)
    labels = labels_of((7,), 403, device=place.device)
    first = head_call(place, head, labels, recompute=recompute)
    for _ in range(1 if place.truncating else 20):
        assert same_bits(first, head_call(place, head, labels, recompute=recompute))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@BOTH_WAYS
def test_every_instruction_set(isa, recompute):
    use_instruction_set(isa)
    try:
        for dtype in (F32, BF16, F64):
            head, labels = head_of((7,), 20, 331, dtype, added=True), labels_of((7,), 331)
            options = {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01}
            assert_head_exact(CPU, head, labels, recompute=recompute, **options)
    finally:
        torch.ops.fasttrain_native.set_cpu_isa("auto")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_many_chunks_and_many_panels_are_as_near_as_one(place, dtype):
    if place.backend == "eager":
        pytest.skip("the reference makes all logits at once")
    kernel = kernel_of("linear_cross_entropy", place.backend)
    small = replace(
        kernel.BACKEND,
        efficient_rows=3,
        chunk_bytes=lambda device: 2**20,
        panel_bytes=lambda device: 1,
    )
    count, classes, device = 8, 700, torch.device(place.device)
    wide = small.product_dtype(dtype)
    assert by_rows.chunk_rows(small, count, classes, wide, device) == 3
    assert by_panels.panel_width(small, count, classes, wide, device) == 256
    leaves = head_of((count,), 33, classes, dtype, True, place.device)
    hidden, weight, bias, inner, outer = (leaf.detach() for leaf in leaves.leaves())
    head, terms = Head((Pair(hidden, weight), Pair(inner, outer)), bias), Terms(1.0, 5.0, 0.1, 0.01)
    labels = labels_of((count,), classes, device=place.device)
    targets = targets_of(labels, IGNORED, classes)
    coefficients = torch.randn(count).to(place.device)
    wanted = (True,) * 5
    statistics, by_chunks = by_rows.forward(
        small, head, None, targets, coefficients, terms, True, wanted, dtype
    )
    in_panels = by_panels.forward(small, head, None, targets, terms, True, dtype)
    by_panel = by_panels.backward(
        small, head, None, targets, coefficients, in_panels, terms, wanted, dtype
    )
    expected = linear_cross_entropy_expected(
        hidden,
        weight,
        labels,
        coefficients,
        bias=bias,
        adapter=(inner, outer),
        product_dtype=product_dtype(place, dtype),
        truncating=place.truncating,
        reduction="none",
        **terms._asdict(),
    )
    names = ("dhidden", "dweight", "dinner", "douter", "dbias")
    for found, gradients in ((statistics, by_chunks), (in_panels, by_panel)):
        rows = outcome(found, targets, terms, classes)
        named = {"loss": rows.losses, "log_probs": rows.log_probs, "entropy": rows.entropy}
        assert_within(expected, named | dict(zip(names, gradients, strict=True)))


@BOTH_WAYS
def test_micro_batches_add_up_to_the_whole_batch(place, recompute):
    """Divided by the items of them all, their losses and gradients are the batch's, added up."""
    head = head_of((8,), 16, 130, F32, True, place.device)
    labels = labels_of((8,), 130, device=place.device)
    num_items = (labels != IGNORED).sum()
    whole = head_expected(place, head, labels, 1.0)
    summed = {name: whole[name] for name in ("loss", "dweight", "dbias", "douter")}
    limits = {name: torch.zeros_like(each.limit) for name, each in summed.items()}
    total, leaves = torch.zeros((), device=place.device), head.copy()
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        micro = replace(leaves, hidden=leaves.hidden[part], inner=leaves.inner[part])
        loss = loss_of(place, micro, labels[part], num_items=num_items, recompute=recompute)
        loss.backward()
        total += loss.detach()
        for name, each in head_expected(
            place, micro, labels[part], 1.0, num_items=num_items
        ).items():
            if name in summed:  # added up in float32: a rounding beside what the part is off by
                limits[name] += each.limit + ROUNDOFF[F32] * (
                    summed[name].value.abs() + each.value.abs()
                )
    expected = whole | {n: Expected(each.value, limits[n]) for n, each in summed.items()}
    gradients = {f"d{name}": gradient for name, gradient in leaves.gradients().items()}
    assert_within(expected, gradients | {"loss": total})
