"""cross_entropy: each backend against exact values, properties, PyTorch's machinery, refusals.

Edge cases are in test_cross_entropy_edges.py; test_interpreter.py runs both on Triton's
interpreter.
"""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import UnsupportedKernel, cross_entropy, testing
from fasttrain_kernels.ops.cross_entropy import reference, self_test
from fasttrain_kernels.ops.cross_entropy.reference import FIELDS, Terms
from fasttrain_kernels.testing_losses import cross_entropy_expected
from hypothesis import given, settings
from ops.loss_calls import (
    BF16,
    CPU,
    F32,
    F64,
    IGNORED,
    OPTIONS,
    assert_exact,
    assert_within,
    filled_in,
    kernel_of,
    labels_of,
    logits_call,
    logits_of,
    same_bits,
    torchs_own,
    upstream,
    use_instruction_set,
)
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

# ---- 1. each backend against exact values --------------------------------------------------------

# One class, two, a prime, two dimensions of rows, one more than a block of Triton's.
SHAPES = [(2, 1), (2, 2), (3, 127), (1, 2, 1000), (1, 4097)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_matches_exact_values(place, dtype, options):
    for shape in SHAPES:
        labels = labels_of(shape[:-1], shape[-1], options.get("ignore_index", IGNORED))
        logits = logits_of(shape, dtype, place.device)
        assert_exact(place, logits, labels.to(place.device), **options)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("classes", [32000, 151936])
def test_vocabularies_of_real_models(place, classes, dtype):
    if place.truncating and classes > 32000:
        pytest.skip("38 blocks a row take the interpreter seconds")
    labels = torch.tensor([classes - 1, IGNORED], device=place.device)
    options = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
    for given_options in ({}, options):
        logits = logits_of((2, classes), dtype, place.device)
        assert_exact(place, logits, labels, **given_options)


@pytest.mark.parametrize("options", OPTIONS)
def test_float64_is_computed_in_float64(place, options):
    if place.backend in ("triton", "cuda"):
        pytest.skip("GPU kernels compute in float32, and say so")
    labels = labels_of((9,), 67, options.get("ignore_index", IGNORED), place.device)
    assert_exact(place, logits_of((9, 67), F64, place.device), labels, **options)


def test_float16_where_it_is_served(place):
    if place.backend == "cpu":
        pytest.skip("not served by the C++ kernel")
    logits = logits_of((5, 300), torch.float16, place.device)
    assert_exact(place, logits, labels_of((5,), 300, device=place.device))


def test_self_test_passes(place):
    kernel, device = kernel_of("cross_entropy", place.backend), torch.device(place.device)
    assert 0 < self_test.parity(kernel, device, truncating=place.truncating) <= 1


@pytest.mark.parametrize("options", OPTIONS)
def test_the_exact_values_are_those_of_torch(options):
    labels = labels_of((40,), 31, options.get("ignore_index", IGNORED))
    options = filled_in(options, labels)
    logits = logits_of((40, 31), F64)
    found = torchs_own(logits, labels, options)
    dloss = upstream(found["loss"])
    found["loss"].backward(dloss)
    expected = cross_entropy_expected(logits, labels, dloss, **options)
    assert_within(expected, found | {"dlogits": logits.grad})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torchs_cross_entropy(place, reduction):
    """To what torch.testing allows float32: exact values have limits of their own above."""
    logits, labels = logits_of((6, 501), F32, place.device), labels_of((6,), 501)
    labels = labels.to(place.device)
    ours = cross_entropy(logits, labels, reduction=reduction, backend=place.backend)
    theirs = F.cross_entropy(logits, labels, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_in_float64(backend, options):
    labels = torch.tensor([3, options.get("ignore_index", IGNORED), 1])
    options = filled_in(options, labels)
    logits = logits_of((3, 5), F64)
    assert torch.autograd.gradcheck(
        lambda logits: cross_entropy(logits, labels, backend=backend, **options), logits
    )


# ---- 2. properties ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([0, 1, 3, 17]),
    classes=st.sampled_from([1, 2, 3, 31, 64, 257, 1024, 3001]),
    dtype=st.sampled_from([F32, BF16, F64]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    ignore_index=st.sampled_from([-100, -1, 0, 7, 10**9]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    scale=st.sampled_from([1.0, 0.125, -2.3]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    weighted=st.booleans(),
    size=st.sampled_from([0.01, 3.0, 40.0]),
    seed=st.integers(0, 2**16),
)
def test_any_call_on_the_cpu(
    rows, classes, dtype, reduction, ignore_index, weighted, size, seed, **terms
):
    labels = labels_of((rows,), classes, ignore_index, seed=seed)
    options = {"token_weights": True} if weighted else {}
    logits = logits_of((rows, classes), dtype, seed=seed, size=size)
    options |= {"reduction": reduction, "ignore_index": ignore_index, **terms}
    assert_exact(CPU, logits, labels, **options)


def test_is_bitwise_repeatable(place):
    logits, labels = logits_of((11, 1003), BF16, place.device), labels_of((11,), 1003)
    labels = labels.to(place.device)
    first = logits_call(place, logits, labels)
    times = 2 if place.truncating else 20
    assert all(same_bits(first, logits_call(place, logits, labels)) for _ in range(times))


def test_the_number_of_threads_changes_no_bit():
    logits, labels = logits_of((70, 4001)), labels_of((70,), 4001)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(logits_call(CPU, logits, labels, reduction="none"))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_a_row_alone_equals_the_row_among_others(place):
    logits, labels = logits_of((9, 777), BF16, place.device), labels_of((9,), 777)
    labels = labels.to(place.device)
    ones = torch.ones(9, device=place.device)

    def losses_and_gradient(rows):
        leaf = logits.detach()[rows].requires_grad_()
        loss = cross_entropy(leaf, labels[rows], reduction="none", backend=place.backend)
        loss.backward(ones[rows])
        return loss.detach(), leaf.grad

    together = losses_and_gradient(slice(None))
    for row in (0, 4, 8):
        alone = losses_and_gradient(slice(row, row + 1))
        assert same_bits(alone, [t[row : row + 1] for t in together])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    use_instruction_set(isa)
    try:
        for shape in ((3, 1), (9, 63), (2, 1000)):
            for dtype in (F32, BF16, F64):
                labels = labels_of(shape[:-1], shape[-1])
                assert_exact(CPU, logits_of(shape, dtype), labels)
                options = {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "scale": 0.9}
                assert_exact(CPU, logits_of(shape, dtype), labels, **options)
    finally:
        torch.ops.fasttrain_native.set_cpu_isa("auto")


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_row_in_many_pieces_has_the_statistics_of_the_whole(place, softcap):
    """The order of the pieces' maxima must not matter: rising, falling, all -inf first."""
    kernel, terms = kernel_of("cross_entropy", place.backend), Terms(1.0, softcap, 0.1)
    logits = logits_of((4, 500), F32, place.device).detach()
    logits[0] += torch.arange(500, device=place.device) / 10
    logits[1] -= torch.arange(500, device=place.device) / 10
    logits[2, :200] = -torch.inf
    targets = torch.tensor([400, 0, 299, 100], device=place.device)  # the ends of pieces
    statistics = torch.empty(2, 4, FIELDS, device=place.device)
    kernel.forward(logits, targets, terms, statistics[0], True)
    for start in range(0, 500, 100):
        piece = logits[:, start : start + 100]
        kernel.forward(piece, targets, terms, statistics[1], True, start)
    whole, pieces = (
        reference.outcome(s, targets, terms._replace(label_smoothing=0.0), 500) for s in statistics
    )
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*statistics[:, :, reference.TOTAL], rtol=1e-5, atol=1e-3)


def test_a_statistic_that_is_not_wanted_is_zero(place):
    kernel = kernel_of("cross_entropy", place.backend)
    logits = logits_of((3, 50), F32, place.device).detach()
    targets = torch.tensor([0, 1, reference.INVALID], device=place.device)
    with testing.nan_filled_memory():
        statistics = torch.empty(3, FIELDS, device=place.device)
    kernel.forward(logits, targets, Terms(), statistics, False)
    assert not statistics[:, [reference.TOTAL, reference.WEIGHTED]].any()
    assert statistics[2, reference.LABEL] == 0


def test_targets_and_coefficients_may_have_any_stride(place):
    """Those of the opaque ops, which anybody may call."""
    logits = logits_of((4, 50), F32, place.device).detach()
    targets = torch.tensor([[3, 9], [-1, 9], [0, 9], [49, 9]], device=place.device)[:, 0]
    coefficients = torch.rand(4, 3, device=place.device)[:, 1]
    ops, terms, found = torch.ops.fasttrain, (1.0, 0.0, 0.1, 0.0), []
    for t, c in ((targets, coefficients), (targets.contiguous(), coefficients.contiguous())):
        statistics = ops.cross_entropy_forward(logits, t, terms, False, place.backend)
        gradient = ops.cross_entropy_backward(logits, t, statistics, c, terms, place.backend)
        found.append([statistics[targets >= 0], gradient])
    assert same_bits(*found)


# ---- 4. PyTorch's machinery ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_opcheck(backend):
    ops = torch.ops.fasttrain
    terms = (0.7, 4.0, 0.1, 0.01)
    permuted = torch.randn(19, 5).t()
    for logits in (torch.randn(5, 19, dtype=BF16), permuted, torch.randn(0, 19)):
        targets = torch.arange(len(logits)) - 1
        arguments = (logits, targets, terms, True, backend)
        opcheck(ops.cross_entropy_forward.default, arguments)
        statistics = ops.cross_entropy_forward(*arguments)
        coefficients = torch.rand(len(logits))
        arguments = (logits, targets, statistics, coefficients, terms, backend)
        opcheck(ops.cross_entropy_backward.default, arguments)
        if logits.is_contiguous():
            opcheck(ops.cross_entropy_backward_.default, arguments)


@pytest.mark.slow
def test_torch_compile_in_one_graph(place):
    def loss(logits, labels, num_items):
        found = cross_entropy(
            logits * 1.5,
            labels,
            num_items=num_items,
            z_loss=1e-3,
            return_entropy=True,
            backend=place.backend,
        )
        return found.loss + cross_entropy(logits, labels, softcap=3.0, backend=place.backend)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=place.compiler)
    for rows in (3, 5):
        logits, labels = logits_of((rows, 40), F32, place.device), labels_of((rows,), 40)
        arguments = (logits, labels.to(place.device), torch.tensor(7, device=place.device))
        expected, found = loss(*arguments), compiled(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        one, other = (torch.autograd.grad(each, logits)[0] for each in (expected, found))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(place, reentrant):
    logits, labels = logits_of((4, 60), F32, place.device), labels_of((4,), 60).to(place.device)

    def block(logits):
        return cross_entropy(torch.sin(logits), labels, backend=place.backend)

    expected = torch.autograd.grad(block(logits), logits)
    checkpoint(block, logits, use_reentrant=reentrant).backward()
    assert same_bits(expected, [logits.grad])


def test_autocast_changes_nothing(place):
    """The logits' dtype is what the layer before has made; the loss is float32 in any case."""
    logits, labels = logits_of((4, 60), BF16, place.device), labels_of((4,), 60).to(place.device)
    expected = logits_call(place, logits, labels)
    with torch.autocast(place.device, BF16):
        found = logits_call(place, logits, labels)
    assert same_bits(expected, found) and found[0].dtype == F32


# ---- 5. refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels \(3,\) must have the shape of log"),
        ({"logits": torch.ones(4)}, r"V > 0, without the last dimension; logits are \(4,\)"),
        ({"logits": torch.ones(2, 0)}, r"V > 0.*logits are \(2, 0\)"),
        ({"logits": torch.ones(2, 4, dtype=torch.int64)}, "logits is int64; expected one of float"),
        ({"labels": torch.zeros(2)}, "labels are float32; expected integers"),
        ({"labels": torch.zeros(2, dtype=torch.bool)}, "labels are bool; expected integers"),
        ({"labels": torch.zeros(2, dtype=torch.long, device="meta")}, "labels on meta"),
        ({"reduction": "avg"}, "reduction='avg'; expected one of none, mean, sum"),
        ({"reduction": "sum", "num_items": 3}, 'num_items divides a mean; reduction is "sum"'),
        ({"num_items": torch.ones(2)}, "num_items has 2 elements; expected one number"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5; expected 0 to 1"),
        ({"label_smoothing": float("nan")}, "label_smoothing=nan; expected 0 to 1"),
        ({"z_loss": -1.0}, "z_loss=-1.0; expected 0 or more"),
        ({"z_loss": float("nan")}, "z_loss=nan; expected 0 or more"),
        ({"softcap": 0.0}, "softcap=0.0; expected a number above 0, or None"),
        ({"softcap": float("inf")}, "softcap=inf; expected a number above 0, or None"),
        ({"token_weights": torch.ones(3)}, r"token_weights \(3,\) must have the shape of labels"),
        ({"token_weights": torch.ones(2, requires_grad=True)}, "token_weights want a gradient"),
        ({"inplace": True, "logits": torch.ones(4, 2).t()}, "inplace=True takes contiguous logits"),
        ({"backend": "cda"}, "cross_entropy='cda'; expected one of auto, triton, cuda, cpu, eager"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = {"logits": torch.ones(2, 4), "labels": torch.tensor([0, 1]), **change}
    with pytest.raises(ValueError, match=message):
        cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_a_backend_asked_for_by_name_never_falls_back():
    logits, labels = torch.ones(2, 4, dtype=torch.float16), torch.tensor([0, 1])
    with pytest.raises(UnsupportedKernel, match=r"'cpu'.*not float16\. These can: .*eager"):
        cross_entropy(logits, labels, backend="cpu")
    assert cross_entropy(logits, labels).dtype == F32  # auto: the reference
