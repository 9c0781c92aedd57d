"""cross_entropy at the edges: what doesn't count, infinities, odd memory, memory not to touch."""

import contextlib
import math

import pytest
import torch
from fasttrain_kernels import cross_entropy, dispatch, losses, settings, testing, use
from fasttrain_kernels.ops.cross_entropy import reference
from fasttrain_kernels.ops.cross_entropy.reference import (
    FIELDS,
    INVALID,
    LABEL,
    MAXIMUM,
    SUM,
    Terms,
    compute_dtype,
)
from fasttrain_kernels.testing_losses import CAPPED, cross_entropy_expected
from ops.loss_calls import (
    BF16,
    CPU,
    F32,
    F64,
    IGNORED,
    assert_exact,
    kernel_of,
    labels_of,
    logits_call,
    logits_of,
    same_bits,
    upstream,
    use_instruction_set,
)

EVERYTHING = {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01}

# ---- what doesn't count --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"num_items": 0}, EVERYTHING])
def test_where_nothing_counts_loss_and_gradient_are_zero(place, options):
    for shape in ((4, 9), (0, 9), (2, 0, 9)):
        logits = logits_of(shape, BF16, place.device)
        labels = torch.full(shape[:-1], IGNORED, device=place.device)
        loss = cross_entropy(logits, labels, backend=place.backend, **options)
        loss.backward()
        assert loss == 0 and not logits.grad.any() and logits.grad.shape == shape


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, EVERYTHING])
def test_an_ignored_row_may_hold_anything(place, options):
    labels = torch.tensor([3, IGNORED, IGNORED, 0], device=place.device)
    clean = logits_of((4, 300), F32, place.device)
    dirty = clean.detach().clone()
    dirty[1], dirty[2, 5] = torch.nan, torch.inf
    found, expected = (logits_call(place, x, labels, **options) for x in (dirty, clean))
    assert same_bits(found, expected)
    assert torch.equal(found[1][1:3], torch.zeros(2, 300, device=place.device))


def test_a_label_that_is_no_class_is_named(place):
    logits = logits_of((2, 2, 5), F32, place.device)
    for label in (5, -1, 2**40, -(2**40)):
        labels = torch.tensor([[0, IGNORED], [label, 4]], device=place.device)
        message = f"label {label} at position 2 is none of the 5 classes, and not ignore_index=-100"
        with use(checked=True), pytest.raises(ValueError, match=message):
            cross_entropy(logits, labels, backend=place.backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_graph_makes_nan_of_a_label_that_is_no_class(place, reduction):
    """It can't look at labels; what it must not do is to read a logit that isn't there."""
    logits = logits_of((4, 7), F32, place.device)
    labels = torch.tensor([0, 2**40, -(2**40), 6], device=place.device)
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(logits, labels, reduction=reduction, backend=place.backend)
    loss.sum().backward()
    wrong = [False, True, True, False]
    assert loss.isnan().tolist() == (wrong if reduction == "none" else True)
    assert logits.grad.isnan().all(1).tolist() == logits.grad.isnan().any(1).tolist() == wrong


def test_labels_on_a_gpu_are_looked_at_where_it_is_asked_for(monkeypatch):
    monkeypatch.delenv(settings.ENVIRONMENT, raising=False)
    here, there = torch.zeros(1), torch.zeros(1, device="meta")  # stands for a GPU's
    assert losses.can_look_at(here) and not losses.can_look_at(there)
    with use(checked=True):
        assert losses.can_look_at(there)
        with use(checked=False):
            assert losses.can_look_at(here) and not losses.can_look_at(there)
    monkeypatch.setenv(settings.ENVIRONMENT, "checked=true,mode=auto")
    assert losses.can_look_at(there) and dispatch.choose("rms_norm", device="cpu", **RMS_NORM)
    with use(mode="eager"):
        assert losses.can_look_at(there)
    monkeypatch.setenv(settings.ENVIRONMENT, "checked=yes")
    with pytest.raises(ValueError, match="checked='yes'; expected true or false"):
        settings.checked()


RMS_NORM = {"dtype": F32, "width": 8}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_dtype(place, dtype):
    """-100 as a uint8 would be 156, which is a class."""
    top = min(torch.iinfo(dtype).max, 199)
    labels = torch.tensor([156 if top > 156 else 100, 0, top], device=place.device)
    logits = logits_of((3, 200), F32, place.device)
    narrow, wide = (logits_call(place, logits, each) for each in (labels.to(dtype), labels))
    assert same_bits(narrow, wide) and narrow[1].any(1).all()


# ---- large, infinite and certain -----------------------------------------------------------------


def test_a_masked_class_has_no_probability(place):
    """Logits of -inf, first, last and between, and softmax over what is left."""
    logits = logits_of((3, 300), F32, place.device)
    masked = [0, 7, 150, 299]
    with torch.no_grad():
        logits[:, masked] = -torch.inf
    for options in ({}, {"z_loss": 0.01}, {"reduction": "sum"}):
        logits.grad = None
        assert_exact(place, logits, torch.tensor([1, 2, IGNORED], device=place.device), **options)
        assert not logits.grad[:, masked].any()
    label = torch.tensor([1, 0, 1], device=place.device)
    loss = cross_entropy(logits, label, reduction="none", backend=place.backend)
    assert loss.isinf().tolist() == [False, True, False]  # a class that can't be


def test_what_is_not_finite_stays_in_its_row(place):
    logits = logits_of((5, 100), F32, place.device)
    with torch.no_grad():
        logits[0], logits[2, 3], logits[3, 99] = -torch.inf, torch.nan, torch.inf
    labels = torch.tensor([1, 2, 3, 4, 5], device=place.device)
    out = cross_entropy(
        logits, labels, reduction="none", return_entropy=True, backend=place.backend
    )
    out.loss.sum().backward()
    finite = [False, True, False, False, True]
    for found in (out.loss[:, None], out.entropy[:, None], logits.grad):
        assert found.isfinite().all(1).tolist() == finite
        assert not found.isinf().any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_logits_of_ten_thousand(place, dtype):
    logits = logits_of((4, 200), dtype, place.device)
    with torch.no_grad():
        logits[0] += 1e4
        logits[1] -= 1e4
        logits[2, ::2], logits[2, 1::2] = 1e4, -1e4
    labels = torch.tensor([0, 1, 2, 3], device=place.device)
    assert_exact(place, logits, labels)
    logits.grad = None
    assert_exact(place, logits, labels, softcap=30.0, z_loss=1e-4, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("lead", [0.0, 4.0, 8.0, 12.0, 16.0, 30.0])
def test_the_gradient_of_a_certain_label_is_right_before_it_is_rounded(place, dtype, lead):
    """p - 1 loses the digits that p has in common with 1: in float32, not in what is stored."""
    logits = torch.zeros(1, 100)
    logits[0, 17] = lead
    logits = logits.to(place.device, dtype).requires_grad_()
    cross_entropy(logits, torch.tensor([17], device=place.device), backend=place.backend).backward()
    others = 99 * math.exp(-lead)
    exact = -others / (1 + others)
    rounding = testing.ROUNDOFF[dtype] * (2 if place.truncating else 1)
    error = abs(float(logits.grad[0, 17]) - exact)
    # The sum of a hundred terms, all near 1; then its inverse, the product, the difference.
    arithmetic = (6 + 100**0.5) * testing.ROUNDOFF[F32]
    assert error <= rounding * abs(exact) + arithmetic
    total = logits.grad.double().sum().abs()
    assert total <= 2 * rounding * abs(exact) + 2 * arithmetic


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 1e4}])
@pytest.mark.parametrize("classes", [1, 200])
def test_what_is_certain_has_no_loss_no_entropy_and_no_gradient(place, options, classes):
    """The largest logit is the row's maximum to the last digit, however it was rounded."""
    logits = torch.full((5, classes), -5e3)
    logits[:, 0] = torch.tensor([3e3, 1234.567, 4321.0987, 999.999, 2**-0.5])
    logits = logits.to(place.device).requires_grad_()
    labels = torch.zeros(5, dtype=torch.long, device=place.device)
    found = cross_entropy(
        logits, labels, return_entropy=True, return_log_probs=True, backend=place.backend, **options
    )
    found.loss.backward()
    assert not any(tensor.any() for tensor in (*found, logits.grad))


def test_a_softcapped_logit_is_right_near_zero_too(place):
    """Where 1 - 2 / (exp(2x) + 1) would lose its digits, and where tanh turns into 1."""
    logits = torch.logspace(-30, 2.5, 40)[:, None] * torch.tensor([1.0, -1.0])
    targets, statistics = torch.arange(40) % 2, torch.empty(40, FIELDS, device=place.device)
    kernel, terms = kernel_of("cross_entropy", place.backend), Terms(scale=0.7, softcap=30.0)
    kernel.forward(logits.to(place.device), targets.to(place.device), terms, statistics, False)
    exact = 30 * torch.tanh(0.7 * logits.double() / 30).gather(1, targets[:, None])[:, 0]
    limit = CAPPED * testing.ROUNDOFF[F32] * exact.abs()
    assert testing.Expected(exact, limit).ratio(statistics[:, LABEL]) <= 1


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.0, "label_smoothing": 0.3}])
def test_a_gradient_adds_up_to_zero(place, options):
    logits = logits_of((3, 1000), F32, place.device)
    labels = torch.tensor([3, 4, 5], device=place.device)
    cross_entropy(logits, labels, reduction="sum", backend=place.backend, **options).backward()
    limit = cross_entropy_expected(logits, labels, reduction="sum", **options)["dlogits"].limit
    assert (logits.grad.double().cpu().sum(1).abs() <= limit.sum(1)).all()


# ---- odd memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transposed", "columns", "every other row", "expanded", "offset"])
def test_odd_strides(place, kind):
    base = torch.randn(10, 2, 8).to(place.device)
    logits = {
        "transposed": base.transpose(0, 2),  # (8, 2, 10), no stride is 1 but dim 0's
        "columns": base[:3, :, 2:7],
        "every other row": base.view(20, 8)[::4, :5],
        "expanded": base[0, :1].expand(4, 8),
        "offset": base.flatten()[3 : 3 + 60].view(5, 12),  # 12 bytes off any vector's alignment
    }[kind]
    labels = labels_of((*logits.shape[:-1], 2), 5, device=place.device)[..., 0]
    odd, plain = (
        logits_call(place, x, y, reduction="none")
        for x, y in ((logits, labels), (logits.contiguous(), labels.contiguous()))
    )
    assert same_bits(odd, plain)


def test_a_gradient_of_stride_zero(place):
    logits, labels = logits_of((5, 40), F32, place.device), labels_of((5,), 40).to(place.device)
    loss = cross_entropy(logits, labels, reduction="none", backend=place.backend)
    (from_sum,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (from_ones,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert torch.equal(from_sum, from_ones)


def test_every_element_is_written(place):
    with testing.nan_filled_memory():
        for options in ({}, {"reduction": "none"}, EVERYTHING):
            logits = logits_of((5, 131), BF16, place.device)
            labels = labels_of((5,), 131, device=place.device)
            assert all(t.isfinite().all() for t in logits_call(place, logits, labels, **options))


@pytest.mark.parametrize("classes", [1, 7, 33, 1000])
def test_nothing_outside_is_touched(place, classes):
    if place.device != "cpu":
        pytest.skip("guard pages are made on the CPU")
    kernel, rows = kernel_of("cross_entropy", place.backend), 4
    for dtype in (F32, BF16):
        guards = contextlib.ExitStack()
        logits = logits_of((rows, classes), dtype).detach()
        targets = torch.tensor([reference.IGNORED, INVALID, 0, classes - 1])
        with guards:
            logits, targets, coefficients, statistics, out = (
                guards.enter_context(testing.guarded(t))
                for t in (logits, targets, torch.ones(rows), torch.ones(rows, FIELDS), logits)
            )
            for terms in (Terms(), Terms(1.0, 3.0, 0.1, 0.1)):
                kernel.forward(logits, targets, terms, statistics, True)
                arguments = (logits, targets, terms, statistics, coefficients, out, 0, classes)
                kernel.backward(*arguments)
                kernel.forward_backward(out, targets, terms, statistics, True, coefficients)


def test_more_than_two_to_the_31_logits(place):
    if place.device != "cpu":
        pytest.skip("sparse memory is made on the CPU")
    kernel, terms = kernel_of("cross_entropy", place.backend), Terms(label_smoothing=0.1)
    targets, coefficients = torch.tensor([5, reference.IGNORED, 63]), torch.rand(3)
    dense = logits_of((3, 64), BF16).detach()
    with testing.sparse_rows(3, 64, 2**30 + 7, BF16) as far:  # the third row is past 2^31 elements
        results = []
        for logits in (far, dense.clone()):
            logits.copy_(dense)
            statistics, both = torch.zeros(2, 3, FIELDS)
            out = torch.empty_like(dense)
            kernel.forward(logits, targets, terms, statistics, True)
            kernel.backward(logits, targets, terms, statistics, coefficients, out, 0, 64)
            kernel.forward_backward(logits, targets, terms, both, True, coefficients)
            results.append([statistics[::2], both[::2], out, logits.clone()])
    assert same_bits(*results)


# ---- autograd ------------------------------------------------------------------------------------


def test_a_second_backward_gives_the_same(place):
    logits, labels = logits_of((5, 40), F32, place.device), labels_of((5,), 40).to(place.device)
    loss = cross_entropy(logits, labels, backend=place.backend)
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    assert same_bits(first, torch.autograd.grad(loss, logits))


def test_a_gradient_of_a_gradient_is_refused():
    logits = logits_of((2, 8))
    loss = cross_entropy(logits, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="cross_entropy is differentiable once"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_in_place_writes_the_gradient_over_the_logits(place):
    labels = labels_of((2, 3), 40).to(place.device)
    base = logits_of((2, 3, 40), F32, place.device)
    expected = logits_call(place, 2 * base, labels)[1]
    logits = 2 * base
    gradients = []
    logits.register_hook(gradients.append)
    loss = cross_entropy(logits, labels, inplace=True, backend=place.backend)
    version, dloss = logits._version, upstream(loss)
    loss.backward(dloss, retain_graph=True)
    assert gradients[0].data_ptr() == logits.data_ptr() and logits._version > version
    assert torch.equal(logits, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(dloss)


def test_in_place_tells_whoever_needs_the_logits_after_it(place):
    labels = labels_of((3,), 40).to(place.device)
    logits = logits_of((3, 40), F32, place.device) * 1
    other = logits.square().sum()  # whose backward pass comes after, and reads the logits
    loss = cross_entropy(logits, labels, inplace=True, backend=place.backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


# ---- exp and tanh of csrc/cpu/vec_math.h ---------------------------------------------------------


def units_in_the_last_place(found, exact):
    exponent = torch.frexp(exact.abs()).exponent - 24
    return ((found.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent)).max()


@pytest.fixture(params=["generic", "avx2", "avx512"])
def instruction_set(request):
    use_instruction_set(request.param)
    yield
    torch.ops.fasttrain_native.set_cpu_isa("auto")


def test_exp_is_within_two_units_in_the_last_place(instruction_set):
    """The gradient of a row whose maximum is 0 and sum 1 is exp(logit), but at the label."""
    x = torch.cat([torch.zeros(1), torch.linspace(-87, 88, 1_000_001), torch.linspace(-1, 1, 9973)])
    statistics = torch.zeros(1, FIELDS)
    statistics[0, SUM] = 1
    out = torch.empty(1, len(x))
    label, one = torch.tensor([0]), torch.ones(1)
    kernel_of("cross_entropy", "cpu").backward(
        x[None], label, Terms(), statistics, one, out, 0, len(x)
    )
    assert out[0, 0] == 0  # exp(0) is 1, exactly
    assert units_in_the_last_place(out[0, 1:], x[1:].double().exp()) <= 2


def test_tanh_is_within_three_units_in_the_last_place(instruction_set):
    """The maximum of a row of equal logits, softcapped at 1, is their tanh; 0 and tiny ones too."""
    size = torch.cat([torch.logspace(-38, 1.5, 4001), torch.linspace(0.5, 0.75, 4001)])
    x = torch.cat([size, -size])
    logits = x[:, None].repeat(1, 17)  # a whole vector of any instruction set, and a part of one
    statistics = torch.empty(len(x), FIELDS)
    targets = torch.zeros(len(x), dtype=torch.long)
    kernel_of("cross_entropy", "cpu").forward(
        logits, targets, Terms(softcap=1.0), statistics, False
    )
    assert units_in_the_last_place(statistics[:, MAXIMUM], x.double().tanh()) <= 3


def test_float64_uses_the_c_librarys(instruction_set):
    assert compute_dtype(F64) == F64
    labels = labels_of((5,), 77)
    assert_exact(CPU, logits_of((5, 77), F64), labels, softcap=2.0, z_loss=0.1)
