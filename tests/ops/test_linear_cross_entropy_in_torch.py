"""linear_cross_entropy inside PyTorch: autograd, the compiler, checkpointing, autocast, memory."""

from dataclasses import replace

import pytest
import torch
from fasttrain_kernels import linear_cross_entropy
from fasttrain_kernels.ops.cross_entropy import reference as row_reference
from fasttrain_kernels.ops.cross_entropy.reference import Terms
from fasttrain_kernels.ops.linear_cross_entropy import by_panels, by_rows
from fasttrain_kernels.ops.linear_cross_entropy.products import gpu_backend
from fasttrain_kernels.ops.linear_cross_entropy.reference import Head, Pair
from fasttrain_kernels.testing_losses import linear_cross_entropy_expected
from ops.loss_calls import (
    BF16,
    CPU,
    F32,
    IGNORED,
    Calls,
    assert_within,
    head_call,
    head_of,
    labels_of,
    loss_of,
    product_dtype,
    same_bits,
    upstream,
)
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

BOTH_WAYS = pytest.mark.parametrize("recompute", [False, True], ids=["by-rows", "by-panels"])

# ---- autograd ------------------------------------------------------------------------------------


@BOTH_WAYS
def test_a_second_backward_gives_the_same(place, recompute):
    """Even where the first one's results, or what came of them, have been changed."""
    head = head_of((5,), 24, 40, F32, True, place.device)
    labels = labels_of((5,), 40, device=place.device)
    for options in ({"reduction": "sum"}, {}):  # a sum's gradient is multiplied by 1
        loss = loss_of(place, head, labels, recompute=recompute, **options)
        first = torch.autograd.grad(loss, head.leaves(), retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        for gradient in first:
            gradient.mul_(3)
        second = torch.autograd.grad(loss, head.leaves(), retain_graph=True)
        assert same_bits(kept, second)
        twice = torch.autograd.grad(loss, head.leaves(), torch.full_like(loss, 2.0))
        assert same_bits(kept, second) and same_bits(twice, [2 * gradient for gradient in kept])


@BOTH_WAYS
def test_a_gradient_of_a_gradient_is_refused(recompute):
    head = head_of((2,), 8, 9)
    loss = loss_of(CPU, head, torch.tensor([1, 2]), recompute=recompute)
    with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once"):
        torch.autograd.grad(loss, head.hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "inner", "outer"])
def test_only_what_wants_a_gradient_gets_one(place, wanted, reduction):
    head = head_of((4,), 24, 40, F32, True, place.device)
    labels = labels_of((4,), 40, device=place.device)
    everything = head_call(place, head, labels, reduction=reduction)[1:]
    leaves = head.copy()
    for name, leaf in leaves.named().items():
        leaf.requires_grad_(name == wanted)
    loss = loss_of(place, leaves, labels, reduction=reduction)
    loss.backward(upstream(loss))
    for (name, gradient), full in zip(leaves.gradients().items(), everything, strict=True):
        assert torch.equal(gradient, full) if name == wanted else gradient is None


def test_without_a_graph_no_gradient_is_computed(place):
    head = head_of((4,), 24, 40, device=place.device)
    frozen = replace(head, hidden=head.hidden.detach(), weight=head.weight.detach())
    labels = labels_of((4,), 40, device=place.device)

    def wanted(head, grad_enabled):
        with torch.set_grad_enabled(grad_enabled), Calls() as calls:
            loss_of(place, head, labels)
        ((name, arguments),) = calls.seen
        assert name == "linear_cross_entropy_forward"
        return list(arguments["wanted"])

    assert wanted(head, False) == wanted(frozen, True) == [False, False, False]
    assert wanted(head, True) == [True, True, False]
    with torch.inference_mode():
        assert loss_of(place, frozen, labels) == loss_of(place, head, labels)


@BOTH_WAYS
def test_a_gradient_of_stride_zero(place, recompute):
    head = head_of((5,), 24, 40, device=place.device)
    labels = labels_of((5,), 40, device=place.device)
    loss = loss_of(place, head, labels, reduction="none", recompute=recompute)
    from_sum = torch.autograd.grad(loss.sum(), head.leaves(), retain_graph=True)
    from_ones = torch.autograd.grad(loss, head.leaves(), torch.ones_like(loss))
    assert same_bits(from_sum, from_ones)


def test_log_probs_and_entropy_alone_need_no_backward(place):
    head = head_of((4,), 24, 40, device=place.device)
    labels = labels_of((4,), 40, device=place.device)
    out = loss_of(place, head, labels, return_entropy=True)
    assert out.log_probs is None and not out.entropy.requires_grad
    assert isinstance(loss_of(place, head, labels), torch.Tensor)


# ---- memory --------------------------------------------------------------------------------------


def allocations(run):
    """The bytes of every tensor made on the CPU, on any thread, while `run` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@BOTH_WAYS
def test_the_logits_never_all_exist(recompute, reduction, dtype):
    rows, width, classes = 4096, 8, 4096
    head, labels = head_of((rows,), width, classes, dtype), labels_of((rows,), classes)
    rows = int((labels != IGNORED).sum())

    def run():
        loss_of(CPU, head, labels, recompute=recompute, reduction=reduction).sum().backward()

    sizes = allocations(run)
    largest, held, most = max(sizes), 0, 0
    for size in sizes:  # negative where memory is given back
        held += size
        most = max(most, held)
    logits = rows * classes * F32.itemsize
    assert 0 < largest < 0.2 * logits  # 8 MiB by panels, 224 rows or so by rows
    assert most < 0.25 * logits


# ---- the compiler and contexts -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize(
    ("count", "dtype", "added", "wanted"),
    [
        (5, BF16, True, (True,) * 5),
        (5, F32, False, (True, True, False)),
        (5, F32, True, (False, True, False, True, False)),
        (0, F32, True, (True,) * 5),
        (4, F32, False, (False,) * 3),
    ],
)
def test_opcheck(backend, count, dtype, added, wanted):
    ops = torch.ops.fasttrain
    leaves = [leaf.detach() for leaf in head_of((count,), 12, 19, dtype, added).leaves()]
    hidden, weight, bias, *adapter = leaves if added else (*leaves, None)
    # Permuted, as a transposed view of a parameter is; in float32 nothing makes a copy of it.
    factors = [hidden.t().contiguous().t(), weight.t().contiguous().t(), *adapter]
    rows = torch.tensor([3, 1]) if count and added else None
    targets = torch.tensor([4, -1]) if rows is not None else torch.arange(count) - 1
    tensors = (factors, bias, rows, targets, torch.rand(len(targets)))
    terms, op = (0.7, 4.0, 0.1, 0.01), "linear_cross_entropy"
    forward = (*tensors, terms, wanted, True, dtype, op, backend)
    opcheck(ops.linear_cross_entropy_forward.default, forward)
    statistics, _ = ops.linear_cross_entropy_forward(*forward)
    backward = (*tensors, terms, wanted, statistics, dtype, op, backend)
    opcheck(ops.linear_cross_entropy_backward.default, backward)


@pytest.mark.slow
def test_torch_compile_in_one_graph(place):
    def loss(hidden, weight, labels, num_items):
        options = {"backend": place.backend, "num_items": num_items}
        by_rows = linear_cross_entropy(torch.sin(hidden), weight, labels, z_loss=1e-3, **options)
        found = linear_cross_entropy(
            hidden, weight, labels, recompute=True, softcap=3.0, return_entropy=True, **options
        )
        return by_rows + found.loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=place.compiler)
    for rows in (3, 5):
        head = head_of((rows,), 24, 40, device=place.device)
        labels = labels_of((rows,), 40, device=place.device)
        arguments = (*head.leaves(), labels, torch.tensor(7, device=place.device))
        expected, found = loss(*arguments), compiled(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        one, other = (torch.autograd.grad(each, head.leaves()) for each in (expected, found))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
@BOTH_WAYS
def test_activation_checkpointing(place, recompute, reentrant):
    head = head_of((4,), 24, 40, device=place.device)
    labels = labels_of((4,), 40, device=place.device)

    def block(hidden, weight):
        hidden, options = torch.sin(hidden), {"recompute": recompute, "backend": place.backend}
        return linear_cross_entropy(hidden, weight, labels, **options)

    expected = torch.autograd.grad(block(*head.leaves()), head.leaves())
    checkpoint(block, *head.leaves(), use_reentrant=reentrant).backward()
    assert same_bits(expected, head.gradients().values())


@BOTH_WAYS
@pytest.mark.parametrize("named", [False, True])
def test_autocast_narrows_operands_on_a_gpu_and_nothing_on_a_cpu(place, recompute, named):
    head = head_of((6,), 48, 130, F32, True, place.device)
    labels = labels_of((6,), 130, device=place.device)
    rows = (labels != IGNORED).nonzero()[:, 0] if named else None
    with torch.autocast(place.device, BF16):
        loss = loss_of(place, head, labels, rows=rows, recompute=recompute)
    assert loss.dtype == F32
    loss.backward()
    assert all(gradient.dtype == F32 for gradient in head.gradients().values())
    narrow = product_dtype(place, BF16)
    operands = replace(head, **{n: t.detach().to(narrow).float() for n, t in head.named().items()})
    expected = linear_cross_entropy_expected(
        operands.hidden,
        operands.weight,
        labels,
        **operands.added(),
        product_dtype=narrow,
        truncating=place.truncating,
    )
    found = {f"d{name}": gradient for name, gradient in head.gradients().items()}
    assert_within(expected, found | {"loss": loss})


# ---- waiting for the device ----------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_given_rows_no_value_is_read(recompute, reduction):
    """So that nothing waits for a GPU: tensors of the meta device have no values to wait for."""
    hidden = torch.empty(40, 8, device="meta", requires_grad=True)
    weight = torch.empty(100, 8, device="meta", requires_grad=True)
    labels = torch.empty(40, dtype=torch.int64, device="meta")
    num_items = torch.empty((), device="meta") if reduction == "mean" else None
    losses = linear_cross_entropy(
        *(hidden, weight, labels),
        rows=torch.empty(25, dtype=torch.int64, device="meta"),
        reduction=reduction,
        num_items=num_items,
        recompute=recompute,
    )
    losses.sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_chunks_and_panels_of_a_gpu_read_no_value():
    backend = replace(gpu_backend(row_reference), efficient_rows=16, panel_bytes=lambda device: 1)
    hidden, weight = (torch.empty(n, 8, dtype=BF16, device="meta") for n in (40, 1000))
    head = Head((Pair(hidden, weight),), torch.empty(1000, dtype=BF16, device="meta"))
    rows, targets = (torch.empty(25, dtype=torch.int64, device="meta") for _ in range(2))
    coefficients, wanted = torch.empty(25, device="meta"), (True, True, True)
    shared = (backend, head, rows, targets, coefficients)
    statistics, gradients = by_rows.forward(*shared, Terms(), True, wanted, BF16)
    again = by_panels.backward(*shared, statistics, Terms(), wanted, BF16)
    for tensor, *found in zip(head.tensors(), gradients, again, strict=True):
        assert all(gradient.shape == tensor.shape for gradient in found)
