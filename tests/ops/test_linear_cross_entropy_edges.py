"""linear_cross_entropy at the edges: what doesn't count, infinities, odd memory, refusals."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from fasttrain_kernels import UnsupportedKernel, linear_cross_entropy, testing, use
from fasttrain_kernels.ops.cross_entropy.reference import INVALID, Terms
from fasttrain_kernels.ops.linear_cross_entropy.reference import Head, Pair
from ops.loss_calls import (
    BF16,
    CPU,
    F32,
    F64,
    IGNORED,
    Calls,
    assert_head_exact,
    head_call,
    head_of,
    kernel_of,
    labels_of,
    loss_of,
    same_bits,
)

BOTH_WAYS = pytest.mark.parametrize("recompute", [False, True], ids=["by-rows", "by-panels"])
EVERYTHING = {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01}

# ---- what doesn't count --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"num_items": 0}, EVERYTHING])
@BOTH_WAYS
def test_where_nothing_counts_loss_and_gradients_are_zero(place, recompute, options):
    for shape in ((4,), (0,), (2, 0)):
        head = head_of(shape, 8, 9, BF16, True, place.device)
        labels = torch.full(shape, IGNORED, device=place.device)
        every = torch.arange(labels.numel(), device=place.device)
        for rows in (
            None,
            every[:0],
            every,
        ):  # the rows looked for, none, and some that don't count
            loss, *gradients = head_call(
                place, head, labels, rows=rows, recompute=recompute, **options
            )
            assert loss == 0 and not any(gradient.any() for gradient in gradients)
            assert [g.shape for g in gradients] == [leaf.shape for leaf in head.leaves()]


@BOTH_WAYS
def test_an_ignored_position_may_hold_anything(place, recompute):
    """It is left out of every product, so that not even 0 * NaN comes about."""
    labels = torch.tensor([3, IGNORED, IGNORED, 0], device=place.device)
    clean = head_of((4,), 20, 130, F32, True, place.device)
    dirty = clean.copy()
    with torch.no_grad():
        dirty.hidden[1], dirty.inner[2] = torch.nan, torch.inf
    for rows in (None, torch.tensor([0, 3], device=place.device)):
        for options in ({}, {"reduction": "none"}, EVERYTHING):
            arguments = {"rows": rows, "recompute": recompute, **options}
            found, expected = (head_call(place, h, labels, **arguments) for h in (dirty, clean))
            assert same_bits(found, expected)
            assert not found[1][1:3].any()


def test_rows_that_are_looked_for_are_those_that_count(place):
    """Products are of those rows alone; of all, without a copy, where all count."""
    head = head_of((2, 3), 8, 9, device=place.device)
    some = torch.tensor([[1, IGNORED, 2], [IGNORED, 3, 0]], device=place.device)
    for labels, rows in ((some, [0, 2, 4, 5]), (some.clamp(min=0), None)):
        with Calls() as calls:
            loss_of(place, head, labels)
        found = calls.seen[0][1]["rows"]
        assert found is None if rows is None else found.tolist() == rows


def test_a_label_that_is_no_class_is_named(place):
    head = head_of((2, 2), 8, 5, device=place.device)
    for label in (5, -1, 2**40, -(2**40)):
        labels = torch.tensor([[0, IGNORED], [label, 4]], device=place.device)
        message = f"label {label} at position 2 is none of the 5 classes, and not ignore_index=-100"
        for rows in (None, torch.tensor([3, 2], device=place.device)):
            with use(checked=True), pytest.raises(ValueError, match=message):
                loss_of(place, head, labels, rows=rows)


@BOTH_WAYS
def test_a_compiled_graph_makes_nan_of_a_label_that_is_no_class(place, recompute):
    head = head_of((4,), 8, 7, device=place.device)
    labels = torch.tensor([0, 2**40, -(2**40), 6], device=place.device)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(*head.leaves(), labels, recompute=recompute, backend=place.backend)
    loss.backward()
    assert loss.isnan() and head.weight.grad.isnan().all()
    assert head.hidden.grad.isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_dtype(place, dtype):
    """-100 as a uint8 would be 156, which is a class."""
    labels = torch.tensor([156, 0, 199], device=place.device)
    head = head_of((3,), 8, 200, device=place.device)
    narrow, wide = (head_call(place, head, each) for each in (labels.to(dtype), labels))
    assert same_bits(narrow, wide) and narrow[1].any(1).all()


# ---- large, infinite and certain -----------------------------------------------------------------


@BOTH_WAYS
def test_a_masked_class_has_no_probability(place, recompute):
    """A bias of -inf, and softmax over what is left; whole panels of such classes too."""
    head = head_of((3,), 8, 600, F32, True, place.device)
    with torch.no_grad():
        head.bias[:300] = head.bias[599] = -torch.inf
    labels = torch.tensor([300, IGNORED, 598], device=place.device)
    assert_head_exact(place, head, labels, recompute=recompute)
    gradients = head_call(place, head, labels, recompute=recompute)[1:]
    assert not gradients[1][:300].any() and not gradients[2][:300].any()


@BOTH_WAYS
def test_what_is_not_finite_stays_in_its_row(place, recompute):
    head = head_of((4,), 8, 100, device=place.device)
    with torch.no_grad():
        head.hidden[1, 3] = torch.nan
    labels = torch.tensor([1, 2, 3, 4], device=place.device)
    loss = loss_of(place, head, labels, reduction="none")
    mean = loss_of(place, head, labels, recompute=recompute)
    for each in (loss.sum(), mean):
        (gradient,) = torch.autograd.grad(each, head.hidden, retain_graph=True)
        assert gradient.isnan().all(1).tolist() == [False, True, False, False]
        assert gradient[[0, 2, 3]].isfinite().all()
    assert loss.isnan().tolist() == [False, True, False, False] and mean.isnan()


@BOTH_WAYS
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_logits_of_ten_thousand(place, recompute, dtype):
    head = head_of((4,), 8, 200, dtype, device=place.device)
    with torch.no_grad():
        head.hidden.mul_(2000)
        head.hidden[2] *= -1
    labels = torch.tensor([0, 1, 2, IGNORED], device=place.device)
    assert loss_of(place, head, labels, reduction="none").max() > 1000
    assert_head_exact(place, head, labels, recompute=recompute)
    assert_head_exact(place, head, labels, recompute=recompute, softcap=30.0, z_loss=1e-4)


@pytest.mark.parametrize("way", [None, False, True])
def test_float16_gradients_of_a_mean_neither_overflow_nor_vanish(place, way):
    """Not yet divided, the sum over these rows is 120 thousand; the largest float16 is 65504."""
    hidden = torch.full((8, 1), 16000.0, device=place.device).half().requires_grad_()
    weight = torch.zeros(16, 1, device=place.device).half().requires_grad_()
    labels = torch.full((8,), 3, device=place.device)
    loss = linear_cross_entropy(hidden, weight, labels, recompute=way, backend=place.backend)
    loss.backward()
    exact = torch.full((16,), 16000 / 16)
    exact[3] = -16000 * 15 / 16
    torch.testing.assert_close(weight.grad[:, 0].float().cpu(), exact, rtol=2e-3, atol=0)


@BOTH_WAYS
@pytest.mark.parametrize("lead", [4.0, 8.0, 16.0])
def test_the_gradient_of_a_certain_label_is_right_before_it_is_rounded(place, recompute, lead):
    """That of the bias, of one row, is dlogits: p - 1 is formed in float32, then rounded."""
    hidden = torch.ones(1, 1, device=place.device, dtype=BF16)
    weight = torch.zeros(100, 1, device=place.device, dtype=BF16)
    bias = torch.zeros(100, device=place.device, dtype=BF16)
    weight[17] = lead
    head = replace(head_of((1,), 1, 1), hidden=hidden, weight=weight, bias=bias)
    for leaf in head.leaves():
        leaf.requires_grad_()
    loss_of(place, head, torch.tensor([17], device=place.device), recompute=recompute).backward()
    others = 99 * math.exp(-lead)
    exact = -others / (1 + others)
    # Stored twice where products are narrow, by an interpreter that truncates the first time.
    rounding = (3 if place.truncating else 2) * testing.ROUNDOFF[BF16]
    arithmetic = (6 + 100**0.5) * testing.ROUNDOFF[F32]
    assert abs(float(head.bias.grad[17]) - exact) <= rounding * abs(exact) + arithmetic


# ---- odd memory ----------------------------------------------------------------------------------

KINDS = ["transposed", "columns", "every other row", "expanded", "offset"]


def oddly_laid(kind, rows, width, device):
    base = torch.randn(30, 30, generator=torch.Generator().manual_seed(5)).to(device)
    return {
        "transposed": base.flatten()[: rows * width].view(width, rows).t(),
        "columns": base[:rows, 3 : 3 + width],
        "every other row": base[: 2 * rows : 2, :width],
        "expanded": base[:1, :width].expand(rows, width),
        "offset": base.flatten()[3 : 3 + rows * width].view(rows, width),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@BOTH_WAYS
def test_odd_strides(place, recompute, kind):
    """Of every factor; and gradients come contiguous, as compiled graphs take them to be."""
    labels = labels_of((6, 2), 12, device=place.device)[:, 0]
    hidden, inner = (oddly_laid(kind, 6, k, place.device).requires_grad_() for k in (9, 4))
    weight, outer = (oddly_laid(kind, 12, k, place.device).requires_grad_() for k in (9, 4))
    bias = torch.randn(24, device=place.device)[::2].requires_grad_()
    head = replace(
        head_of((1,), 1, 1), hidden=hidden, weight=weight, bias=bias, inner=inner, outer=outer
    )
    loss = loss_of(place, head, labels, recompute=recompute)
    odd = torch.autograd.grad(loss, head.leaves())
    assert all(gradient.is_contiguous() for gradient in odd)
    plain = replace(
        head, **{n: t.detach().contiguous().requires_grad_() for n, t in head.named().items()}
    )
    loss = loss_of(place, plain, labels.contiguous(), recompute=recompute)
    for one, other in zip(odd, torch.autograd.grad(loss, plain.leaves()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@BOTH_WAYS
def test_every_element_is_written(place, recompute):
    with testing.nan_filled_memory():
        for options in ({}, {"reduction": "none"}, EVERYTHING):
            head = head_of((5,), 16, 131, BF16, True, place.device)
            labels = labels_of((5,), 131, device=place.device)
            for rows in (None, torch.tensor([1, 4], device=place.device)):
                found = head_call(place, head, labels, rows=rows, recompute=recompute, **options)
                assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("classes", [1, 33, 301])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_outside_is_touched(place, dtype, classes):
    if place.device != "cpu":
        pytest.skip("guard pages are made on the CPU")
    kernel = kernel_of("linear_cross_entropy", place.backend)
    leaves = head_of((4,), 9, classes, dtype, True).leaves()
    with contextlib.ExitStack() as guards:

        def guarded(tensor):
            return guards.enter_context(testing.guarded(tensor.detach()))

        hidden, weight, bias, inner, outer = map(guarded, leaves)
        rows, targets = guarded(torch.tensor([3, 0, 2])), guarded(torch.tensor([0, INVALID, -1]))
        head, coefficients = Head((Pair(hidden, weight), Pair(inner, outer)), bias), torch.ones(3)
        arguments = (head, rows, targets, guarded(coefficients))
        for terms in (Terms(), Terms(1.0, 3.0, 0.1, 0.1)):
            for wanted in ((True,) * 5, (False,) * 5):
                statistics, _ = kernel.forward(*arguments, terms, True, wanted, dtype)
            kernel.backward(*arguments, guarded(statistics), terms, (True,) * 5, dtype)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.ones(5, 3)},
            r"weight \(5, 3\) must be \(V, K\) for hidden \(\.\.\., K\)",
        ),
        ({"weight": torch.ones(0, 4)}, r"V, K > 0; hidden is \(2, 4\), weight \(0, 4\)"),
        ({"hidden": torch.ones(2, 0), "weight": torch.ones(5, 0)}, r"hidden is \(2, 0\)"),
        ({"hidden": torch.ones(4)}, r"hidden is \(4,\)"),
        ({"weight": torch.ones(4)}, r"weight \(4,\) must be"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels \(3,\) must have the shape of hid"),
        ({"bias": torch.ones(4)}, r"bias \(4,\) must be \(5,\)"),
        (
            {"adapter": (torch.ones(2, 3), torch.ones(5, 2))},
            r"adapter's outer \(5, 2\) must be \(V, K\) for adapter's inner",
        ),
        ({"adapter": (torch.ones(2, 3), torch.ones(4, 3))}, r"adapter's outer \(4, 3\) must be"),
        ({"adapter": (torch.ones(3, 3), torch.ones(5, 3))}, "must have the shape of adapter's inn"),
        ({"rows": torch.ones(1, 1, dtype=torch.long)}, r"rows \(1, 1\) of int64 must be \(S,\)"),
        (
            {"rows": torch.ones(1, dtype=torch.int32)},
            r"rows \(1,\) of int32 must be \(S,\) of int6",
        ),
        ({"hidden": torch.ones(2, 4, dtype=torch.int64)}, "hidden is int64; expected one of float"),
        ({"hidden": torch.ones(2, 4, dtype=BF16)}, r"several dtypes \(bfloat16, float32\); cast"),
        ({"bias": torch.ones(5, dtype=F64)}, r"several dtypes \(float32, float64\)"),
        ({"weight": torch.ones(5, 4, device="meta")}, "weight on meta"),
        ({"rows": torch.ones(1, dtype=torch.long, device="meta")}, "rows on meta"),
        ({"labels": torch.zeros(2)}, "labels are float32; expected integers"),
        ({"reduction": "avg"}, "reduction='avg'; expected one of none, mean, sum"),
        ({"reduction": "none", "num_items": 3}, 'num_items divides a mean; reduction is "none"'),
        ({"num_items": torch.ones(2)}, "num_items has 2 elements; expected one number"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1; expected 0 to 1"),
        ({"z_loss": -1.0}, "z_loss=-1.0; expected 0 or more"),
        ({"softcap": -2.0}, "softcap=-2.0; expected a number above 0, or None"),
        ({"token_weights": torch.ones(3)}, r"token_weights \(3,\) must have the shape of labels"),
        ({"token_weights": torch.ones(2, requires_grad=True)}, "token_weights want a gradient"),
        ({"backend": "cda"}, "linear_cross_entropy='cda'; expected one of auto, triton, cuda, cpu"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = {
        "hidden": torch.ones(2, 4),
        "weight": torch.ones(5, 4),
        "labels": torch.tensor([0, 1]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_rows_outside_are_refused():
    head = head_of((2,), 4, 5)
    for row in (2, -1):
        with pytest.raises(IndexError, match="out of range"):
            loss_of(CPU, head, torch.tensor([0, 1]), rows=torch.tensor([row]))


def test_autocast_leaves_float64_to_the_caller():
    head = head_of((2,), 4, 5, F64)
    with torch.autocast("cpu", BF16):
        assert loss_of(CPU, head, torch.tensor([0, 1])).dtype == F64
        mixed = replace(head, weight=head.weight.detach().float())
        with pytest.raises(ValueError, match=r"several dtypes \(float32, float64\)"):
            loss_of(CPU, mixed, torch.tensor([0, 1]))


def test_a_backend_asked_for_by_name_never_falls_back():
    head = [leaf.detach() for leaf in head_of((2,), 4, 5).leaves()]
    message = "linear_cross_entropy: backend 'cuda'.*These can: cpu, eager"
    with pytest.raises(UnsupportedKernel, match=message):
        linear_cross_entropy(*head, torch.tensor([0, 1]), backend="cuda")
