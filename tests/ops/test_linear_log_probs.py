"""linear_log_probs: per token and per document, against exact values; gradients of any loss."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import linear_log_probs, testing, use
from fasttrain_kernels.ops.linear_log_probs import self_test
from fasttrain_kernels.ops.linear_log_probs.reference import document_sums
from ops.loss_calls import (
    BF16,
    CPU,
    F32,
    F64,
    IGNORED,
    Calls,
    assert_within,
    head_expected,
    head_of,
    kernel_of,
    labels_of,
    same_bits,
    upstream,
)
from torch.library import opcheck

BOUNDS = (0, 3, 3, 4, 9)  # of documents: the second is empty, the third a single token


def call(place, head, labels, cu_seqlens=None, **options):
    if cu_seqlens is not None:
        cu_seqlens = torch.as_tensor(cu_seqlens, device=place.device)
    arguments = (head.hidden, head.weight, labels, cu_seqlens)
    return linear_log_probs(*arguments, backend=place.backend, **head.added(), **options)


def documents(bounds):
    return [slice(begin, end) for begin, end in pairwise(bounds)]


# ---- against exact values ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("options", [{}, {"scale": 0.4, "softcap": 3.0}, {"ignore_index": 5}])
def test_matches_exact_values(place, options, dtype):
    if place.backend in ("triton", "cuda") and dtype == F64:
        pytest.skip("GPU kernels compute in float32, and say so")
    for shape, added in (((6,), True), ((2, 2), False)):
        labels = labels_of(shape, 301, options.get("ignore_index", IGNORED), place.device)
        head = head_of(shape, 20, 301, dtype, added, place.device)
        log_probs = call(place, head, labels, **options)
        assert log_probs.shape == labels.shape and log_probs.dtype == (F64 if dtype == F64 else F32)
        gradient = upstream(log_probs)
        log_probs.backward(gradient)
        expected = head_expected(place, head, labels, -gradient, reduction="none", **options)
        found = {f"d{name}": each for name, each in head.gradients().items()}
        assert_within(expected, found | {"log_probs": log_probs})
        assert not log_probs[labels == options.get("ignore_index", IGNORED)].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sums_over_documents_are_those_of_a_loop(place, dtype):
    head = head_of((3, 3), 20, 130, F32, True, place.device)
    labels = labels_of((3, 3), 130, device=place.device)
    sums = call(place, head, labels, torch.tensor(BOUNDS, dtype=dtype))
    expected = head_expected(place, head, labels, 1.0)["log_probs"]
    assert sums.shape == (4,) and sums[1] == 0
    for found, document in zip(sums, documents(BOUNDS), strict=True):
        value, limit = (t.flatten()[document].sum() for t in (expected.value, expected.limit))
        rounding = testing.ROUNDOFF[F32] * value.abs()  # added up in float64, rounded once
        assert testing.Expected(value, limit + rounding).ratio(found) <= 1


def test_gradients_of_sums_with_any_gradient_upstream(place):
    """As in preference losses: a factor for each document, unknown before the loss."""
    head = head_of((9,), 20, 130, F32, True, place.device)
    labels = labels_of((9,), 130, device=place.device)
    sums = call(place, head, labels, BOUNDS)
    loss = -F.logsigmoid(0.1 * (sums[0] - sums[3])) + sums[1] + 0.3 * sums[2]
    factors = torch.autograd.grad(loss, sums, retain_graph=True)[0]
    loss.backward()
    lengths = torch.tensor([document.stop - document.start for document in documents(BOUNDS)])
    per_token = factors.cpu().repeat_interleave(lengths)
    expected = head_expected(place, head, labels, -per_token, reduction="none")
    assert_within(expected, {f"d{name}": each for name, each in head.gradients().items()})


def test_self_test_passes(place):
    kernel, device = kernel_of("linear_log_probs", place.backend), torch.device(place.device)
    if not place.truncating:
        assert 0 < self_test.parity(kernel, device) <= 1
    assert self_test._sums(kernel, device) <= 1  # the rest is linear_cross_entropy's


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradcheck_in_float64(backend):
    labels = torch.tensor([3, IGNORED, 1, 0])
    head = head_of((4,), 4, 5, F64)
    bounds = torch.tensor([0, 1, 1, 4])
    assert torch.autograd.gradcheck(
        lambda *factors: linear_log_probs(*factors, labels, bounds, softcap=3.0, backend=backend),
        head.leaves(),
    )


# ---- documents -----------------------------------------------------------------------------------


def test_a_document_does_not_change_with_its_neighbour(place):
    head = head_of((9,), 20, 130, F32, device=place.device)
    labels = labels_of((9,), 130, device=place.device)
    before = call(place, head, labels, BOUNDS)
    changed = head.copy()
    with torch.no_grad():
        changed.hidden[:3] *= 1e3
    after = call(place, changed, labels, BOUNDS)
    assert before[0] != after[0] and torch.equal(before[1:], after[1:])


def test_positions_in_no_document_count_for_nothing(place):
    head = head_of((9,), 20, 130, F32, device=place.device)
    labels = labels_of((9,), 130, device=place.device).clamp(min=0)
    sums = call(place, head, labels, [2, 4, 7])
    per_token = call(place, head, labels)
    expected = torch.stack([per_token[2:4].double().sum(), per_token[4:7].double().sum()])
    assert torch.equal(sums, expected.float())
    sums.sum().backward()
    assert head.hidden.grad.any(1).tolist() == [False] * 2 + [True] * 5 + [False] * 2


def test_no_documents_and_no_positions(place):
    head = head_of((9,), 8, 12, device=place.device)
    labels = labels_of((9,), 12, device=place.device)
    assert call(place, head, labels, [0]).shape == (0,)
    empty = head_of((0,), 8, 12, device=place.device)
    sums = call(place, empty, labels[:0], [0, 0, 0])
    sums.sum().backward()
    assert sums.tolist() == [0, 0] and not empty.weight.grad.any()


@pytest.mark.parametrize(
    ("bounds", "named"),
    [
        ([-1, 4], "entry 0 is -1"),
        ([0, 5, 4, 9], "entry 2 is 4"),
        ([0, 10], "entry 1 is 10"),
        ([0, 2**40], f"entry 1 is {2**40}"),
    ],
)
def test_bounds_outside_the_positions_are_named(place, bounds, named):
    head, labels = head_of((9,), 8, 12, device=place.device), labels_of((9,), 12)
    labels = labels.to(place.device)
    message = f"cu_seqlens must rise from 0 or more to at most the 9 positions; {named}"
    with use(checked=True), pytest.raises(ValueError, match=message):
        call(place, head, labels, bounds)


def test_nothing_outside_is_read_where_bounds_cannot_be_looked_at():
    values = torch.randn(9)
    outside = document_sums(values, torch.tensor([-(2**40), 3, 2**40]))
    assert torch.equal(outside, document_sums(values, torch.tensor([0, 3, 9])))


# ---- PyTorch's machinery and refusals ------------------------------------------------------------


def test_is_bitwise_repeatable(place):
    head = head_of((9,), 20, 403, BF16, device=place.device)
    labels = labels_of((9,), 403, device=place.device)

    def everything():
        leaves = head.copy()
        sums = call(place, leaves, labels, BOUNDS)
        sums.backward(upstream(sums))
        return [sums.detach(), *leaves.gradients().values()]

    first = everything()
    assert all(same_bits(first, everything()) for _ in range(1 if place.truncating else 10))


def test_it_follows_its_own_setting_and_keeps_no_gradients_of_its_own():
    head, labels = head_of((4,), 8, 12), labels_of((4,), 12)
    with Calls() as calls, use(linear_cross_entropy="eager"):
        call(CPU, head, labels).sum().backward()
    (forward, backward) = (arguments for _, arguments in calls.seen)
    assert forward["op"] == backward["op"] == "linear_log_probs"
    assert list(forward["wanted"]) == [False] * 3 and list(backward["wanted"]) == [
        True,
        True,
        False,
    ]
    with use(linear_log_probs="cuda"), pytest.raises(ValueError, match="linear_log_probs: backend"):
        call(CPU, head, labels)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_opcheck(backend):
    """The ops are linear_cross_entropy's, called by another name."""
    hidden, weight = (leaf.detach() for leaf in head_of((4,), 8, 12).leaves())
    tensors = ((hidden, weight), None, None, torch.tensor([3, -1, 0, 1]), torch.ones(4))
    options = ((1.0, 0.0, 0.0, 0.0), (False,) * 3, False, F32, "linear_log_probs", backend)
    opcheck(torch.ops.fasttrain.linear_cross_entropy_forward.default, (*tensors, *options))


@pytest.mark.slow
def test_torch_compile_in_one_graph():
    def sums(hidden, weight, labels, cu_seqlens):
        return linear_log_probs(torch.sin(hidden), weight, labels, cu_seqlens)

    torch._dynamo.reset()
    compiled = torch.compile(sums, fullgraph=True, dynamic=True)
    for bounds in ([0, 1, 3], [0, 2, 2, 5]):
        head = head_of((bounds[-1],), 24, 40)
        labels = labels_of((bounds[-1],), 40)
        arguments = (*head.leaves(), labels, torch.tensor(bounds))
        expected, found = sums(*arguments), compiled(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        one, other = (torch.autograd.grad(each.sum(), head.leaves()) for each in (expected, found))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_autocast_changes_nothing_on_a_cpu():
    head, labels = head_of((9,), 20, 130), labels_of((9,), 130)
    expected = call(CPU, head, labels, BOUNDS)
    with torch.autocast("cpu", BF16):
        assert torch.equal(call(CPU, head, labels, BOUNDS), expected)


def test_a_gradient_of_a_gradient_is_refused():
    head, labels = head_of((4,), 8, 12), labels_of((4,), 12)
    with pytest.raises(RuntimeError, match="linear_log_probs is differentiable once"):
        torch.autograd.grad(call(CPU, head, labels).sum(), head.hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.long)}, r"cu_seqlens \(2, 2\) of int64 must"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.long)}, r"cu_seqlens \(0,\) of int64 must be"),
        ({"cu_seqlens": torch.zeros(2)}, r"of float32 must be \(documents \+ 1,\) integers"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.long, device="meta")}, "cu_seqlens on meta"),
        (
            {"labels": torch.tensor([0, 5])},
            "linear_log_probs: label 5 at position 1 is none of the",
        ),
        ({"weight": torch.ones(5, 3)}, r"linear_log_probs: weight \(5, 3\) must be \(V, K\)"),
        ({"softcap": 0.0}, "linear_log_probs: softcap=0.0; expected a number above 0"),
        ({"hidden": torch.ones(2, 4, dtype=BF16)}, "linear_log_probs: tensors of several dtypes"),
        ({"backend": "cda"}, "linear_log_probs='cda'; expected one of auto, triton, cuda, cpu"),
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
        linear_log_probs(**arguments)
