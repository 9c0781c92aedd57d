"""embedding: exact values, properties, edges, PyTorch's machinery, refusals, on each backend."""

import contextlib

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import UnsupportedKernel, dispatch, embedding, native, testing, use
from fasttrain_kernels.ops.embedding import reference, self_test
from fasttrain_kernels.testing_embedding import embedding_expected
from hypothesis import given, settings
from ops.rms_norm_calls import BF16, CPU, F32, F64, same_bits
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint


def kernel_of(backend):
    """The module that implements a backend."""
    return dispatch.OPS["embedding"].candidate(backend).load()


def inputs(tokens, rows, width, dtype=F32, device="cpu", frequent=0, seed=0):
    """ids of which `frequent` are one row, weight as a leaf, dy, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(rows, (tokens,), generator=generator)
    ids[torch.randperm(tokens, generator=generator)[:frequent]] = rows // 2
    weight, dy = (
        torch.randn(count, width, generator=generator).to(dtype) for count in (rows, tokens)
    )
    return ids.to(device), weight.to(device).requires_grad_(), dy.to(device)


def call(place, ids, weight, dy, padding_idx=None):
    """y and the gradient of one call."""
    weight = weight.detach().requires_grad_()
    y = embedding(ids, weight, padding_idx=padding_idx, backend=place.backend)
    return y.detach(), torch.autograd.grad(y, weight, dy.view_as(y))[0]


def assert_exact(place, ids, weight, dy, padding_idx=None):
    y, dweight = call(place, ids, weight, dy, padding_idx)
    row = -1 if padding_idx is None else padding_idx % len(weight)
    expected = embedding_expected(ids, weight, dy, row, truncating=place.truncating)
    assert expected["y"].ratio(y) <= 1 and y.dtype == weight.dtype
    assert expected["dweight"].ratio(dweight) <= 1 and dweight.dtype == weight.dtype


# ---- 1. each backend against exact values --------------------------------------------------------

# Tokens, rows, width, tokens of one id: one of each; rows that tokens lack; rows that lie across
# chunks of 16 (Triton); tokens that are all alike; more columns than any tile.
SHAPES = [(1, 1, 1, 0), (12, 40, 63, 0), (40, 4, 16, 0), (33, 5, 24, 33)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2, 1100, 0)], ids=str)
def test_matches_exact_values(place, shape, dtype):
    *sizes, frequent = shape
    assert_exact(place, *inputs(*sizes, dtype, place.device, frequent))


def test_a_token_that_fills_hundreds_of_chunks(place):
    """The second pass of the Triton backward loads 16 partial sums at a time."""
    tokens = 16 * 17 + 3
    ids, weight, dy = inputs(tokens, 3, 8, F32, place.device, frequent=tokens - 2)
    assert_exact(place, ids, weight, dy)


@pytest.mark.parametrize("padding_idx", [0, 2, -1])
def test_the_padding_row_gets_no_gradient(place, padding_idx):
    ids, weight, dy = inputs(20, 4, 8, F32, place.device)
    y = F.embedding(ids, weight, padding_idx=padding_idx)
    (theirs,) = torch.autograd.grad(y, weight, dy)
    ours = call(place, ids, weight, dy, padding_idx)[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[padding_idx], torch.zeros(8, device=place.device))


def test_float64_is_added_in_float64(place):
    if place.backend == "triton":
        pytest.skip("Triton kernels compute in float32, and say so")
    assert_exact(place, *inputs(40, 3, 17, F64, place.device))


def test_self_test_passes(place):
    device = torch.device(place.device)
    worst = self_test.parity(kernel_of(place.backend), device, truncating=place.truncating)
    assert 0 < worst <= 1


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradcheck_in_float64(backend):
    ids, weight, _ = inputs(9, 4, 5, F64)
    assert torch.autograd.gradcheck(lambda w: embedding(ids, w, backend=backend), (weight,))


def test_a_frequent_token_is_nearer_to_exact_than_torchs_in_bf16():
    ids, weight, dy = inputs(1000, 3, 32, BF16, frequent=900)
    exact = embedding_expected(ids, weight, dy)["dweight"].value
    (theirs,) = torch.autograd.grad(F.embedding(ids, weight), weight, dy)
    ours = call(CPU, ids, weight, dy)[1]
    assert 4 * (ours - exact).norm() < (theirs - exact).norm()


# ---- 2. properties ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 70),
    rows=st.integers(1, 90),
    width=st.sampled_from([1, 7, 16, 33, 1023, 1025]),
    dtype=st.sampled_from([F32, BF16]),
    integers=st.sampled_from([torch.int64, torch.int32]),
    padding=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_on_the_cpu(tokens, rows, width, dtype, integers, padding, seed):
    ids, weight, dy = inputs(tokens, rows, width, dtype, frequent=tokens // 3, seed=seed)
    assert_exact(CPU, ids.to(integers), weight, dy, seed % rows if padding else None)


def test_is_bitwise_repeatable(place):
    leaves = inputs(30, 5, 70, BF16, place.device, frequent=20)
    first = call(place, *leaves)
    assert all(same_bits(first, call(place, *leaves)) for _ in range(2 if place.truncating else 20))


def test_the_number_of_threads_changes_no_bit():
    leaves = inputs(700, 40, 1030, frequent=300)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(CPU, *leaves))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    assert native.why_not("_C_cpu") is None
    try:
        torch.ops.fasttrain_native.set_cpu_isa(isa)
    except RuntimeError:
        pytest.skip(f"this CPU has no {isa}")
    try:
        for dtype in (F32, BF16, F64):
            assert_exact(CPU, *inputs(90, 7, 67, dtype, frequent=40))
    finally:
        torch.ops.fasttrain_native.set_cpu_isa("auto")


# ---- 3. edges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_ids_of_any_shape(place, shape, integers):
    ids = torch.arange(torch.Size(shape).numel(), device=place.device).to(integers).view(shape)
    weight = torch.randn(6, 8, device=place.device).requires_grad_()
    y = embedding(ids, weight, backend=place.backend)
    assert torch.equal(y, F.embedding(ids, weight))
    y.sum().backward()
    assert torch.equal(weight.grad[:, 0], torch.where(torch.arange(6) < ids.numel(), 1.0, 0.0))


@pytest.mark.parametrize("kind", ["transposed", "columns", "every other row"])
def test_odd_strides(place, kind):
    base = torch.randn(12, 12, device=place.device)
    odd = {"transposed": base.T, "columns": base[:, 5:], "every other row": base[::2]}[kind]
    ids = torch.tensor([[0, 3], [1, 3], [5, 4]], device=place.device).T  # (2, 3), not contiguous
    dy = torch.randn(12, device=place.device)[: odd.shape[1]].expand(2, 3, -1)  # stride 0
    results = []
    for table in (odd, odd.contiguous()):
        leaf = table.detach().requires_grad_()
        y = embedding(ids, leaf, backend=place.backend)
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    assert same_bits(*results) and torch.equal(results[0][0], odd[ids])


def test_an_id_that_is_no_row_is_named_on_the_cpu(place):
    weight = torch.randn(5, 8, device=place.device)
    for integers in (torch.int64, torch.int32):
        for wrong in (5, -1, 2**31 - 1, -(2**31)):
            ids = torch.tensor([[0, 4], [wrong, 1]], device=place.device, dtype=integers)
            message = f"embedding: id {wrong} at position 2 is none of the 5 rows of weight"
            with use(checked=True), pytest.raises(IndexError, match=message):
                embedding(ids, weight, backend=place.backend)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_compiled_graph_names_it_too(backend):
    torch._dynamo.reset()
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([1]), torch.ones(2, 4), backend=backend)
    with pytest.raises(IndexError, match="id 7 at position 0"):
        compiled(torch.tensor([7]), torch.ones(2, 4), backend=backend)


def test_an_id_that_is_no_row_touches_nothing(place):
    """Where ids aren't looked at: what a backend does on a GPU."""
    kernel = kernel_of(place.backend)
    wrong = [False, True, False, True, True]
    ids = torch.tensor([1, 2**40, 0, -1, 3], device=place.device)
    weight, dy = (torch.randn(n, 8, device=place.device) for n in (3, 5))
    if place.backend != "cpu":  # whose forward pass takes ids that op.py has looked at
        y = kernel.forward(ids, weight)
        assert y.isnan().any(1).tolist() == wrong and torch.equal(y[[0, 2]], weight[[1, 0]])
    dweight = kernel.backward(dy, ids, 3, reference.NO_PADDING)
    assert torch.equal(dweight, torch.stack([dy[2], dy[0], torch.zeros_like(dy[0])]))


def test_not_a_number_stays_in_its_row(place):
    ids, weight, dy = inputs(20, 6, 8, BF16, place.device)
    dy[3], dy[4, 1] = torch.nan, torch.inf
    finite = call(place, ids, weight, dy)[1].isfinite().all(1)
    assert finite.tolist() == [row not in (ids[3], ids[4]) for row in range(6)]


def test_every_element_is_written(place):
    with testing.nan_filled_memory():
        y, dweight = call(place, *inputs(37, 9, 19, BF16, place.device, frequent=20))
        assert y.isfinite().all() and dweight.isfinite().all()


@pytest.mark.parametrize("width", [1, 33, 1025])
def test_nothing_outside_is_read(place, width):
    if place.device != "cpu":
        pytest.skip("guard pages are made on the CPU")
    kernel = kernel_of(place.backend)
    leaves = [t.detach() for t in inputs(19, 5, width, BF16, frequent=10)]
    with contextlib.ExitStack() as guards:
        ids, weight, dy = (guards.enter_context(testing.guarded(t)) for t in leaves)
        ids[-1] = 4
        kernel.forward(ids, weight)
        kernel.backward(dy, ids, 5, reference.NO_PADDING)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_outside_is_written_by_the_native_kernel(dtype):
    ids, weight, dy = inputs(19, 5, 27, dtype)
    ids[-1] = 4  # the last row is written
    owners, tokens = torch.sort(ids.int(), stable=True)
    with contextlib.ExitStack() as guards:
        memory = [dy, owners, tokens, torch.zeros_like(weight.detach())]
        guarded = [guards.enter_context(testing.guarded(t)) for t in memory]
        torch.ops.fasttrain_native.embedding_backward(*guarded)
        assert torch.equal(guarded[3], kernel_of("cpu").backward(dy, ids, 5, -1))


def test_gradients_more_than_two_to_the_31_elements_away(place):
    if place.device != "cpu":
        pytest.skip("sparse memory is made on the CPU")
    ids = torch.tensor([0, 1, 0])
    with testing.sparse_rows(3, 64, 2**30 + 7, BF16) as dy:  # the third begins past 2^31 elements
        dy[:] = torch.randn(3, 64)
        kernel = kernel_of(place.backend)
        assert torch.equal(kernel.backward(dy, ids, 2, -1), kernel.backward(dy.clone(), ids, 2, -1))


def test_a_row_more_than_two_to_the_31_elements_away(place):
    if place.device != "cpu":
        pytest.skip("sparse memory is made on the CPU")
    with testing.sparse_rows(3, 64, 2**30 + 7, BF16) as weight:
        weight[2] = torch.randn(64)
        y = kernel_of(place.backend).forward(torch.tensor([2]), weight)
        assert torch.equal(y[0], weight[2])


# ---- 4. PyTorch's machinery ---------------------------------------------------------------------


def test_opcheck(place):
    weight = torch.randn(5, 8, device=place.device).to(BF16)
    for ids in (torch.tensor([[0, 4, 4], [1, 2, 4]], device=place.device), weight[:0, 0].int()):
        forward = (ids, weight, place.backend)
        opcheck(torch.ops.fasttrain.embedding_forward.default, forward)
        y = torch.ops.fasttrain.embedding_forward(*forward)
        backward = (y, ids, 5, 2, place.backend)
        opcheck(torch.ops.fasttrain.embedding_backward.default, backward)


def test_torch_compile_in_one_graph(place):
    def tied(ids, weight):
        y = embedding(ids, weight, backend=place.backend)
        return embedding(ids, weight, padding_idx=-1, backend=place.backend) + y.sin() @ y.T @ y

    torch._dynamo.reset()
    compiled = torch.compile(tied, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, rows in ((3, 6), (8, 11)):
        ids, weight, _ = inputs(tokens, rows, 8, device=place.device)
        plain = torch.autograd.grad(tied(ids, weight).sum(), weight)
        assert same_bits(plain, torch.autograd.grad(compiled(ids, weight).sum(), weight))


def test_the_weight_of_a_tied_head_gets_both_gradients(place):
    ids, weight, _ = inputs(20, 5, 8, device=place.device)
    hidden = embedding(ids, weight, backend=place.backend)
    (tied,) = torch.autograd.grad(F.linear(hidden, weight).square().sum(), weight)
    hidden = hidden.detach().requires_grad_()
    loss = F.linear(hidden, weight).square().sum()
    dy, of_the_head = torch.autograd.grad(loss, (hidden, weight))
    assert torch.equal(tied, of_the_head + call(place, ids, weight, dy)[1])


def test_outputs_may_be_changed_in_place(place):
    """Gemma does: `hidden *= sqrt(H)`."""
    ids, weight, _ = inputs(6, 4, 8, device=place.device)
    y = embedding(ids.view(2, 3), weight, backend=place.backend)
    y *= 2
    plain = embedding(ids.view(2, 3), weight, backend=place.backend) * 2
    assert torch.equal(y, plain)
    assert same_bits(*(torch.autograd.grad(each.sum(), weight) for each in (y, plain)))


def test_a_frozen_weight_gets_no_gradient(place):
    ids, weight, _ = inputs(6, 4, 8, device=place.device)
    assert not embedding(ids, weight.detach(), backend=place.backend).requires_grad


def test_a_second_backward_gives_the_same(place):
    ids, weight, _ = inputs(20, 5, 8, device=place.device)
    out = embedding(ids, weight, backend=place.backend).square().sum()
    first = torch.autograd.grad(out, weight, retain_graph=True)
    assert same_bits(first, torch.autograd.grad(out, weight))


def test_a_gradient_of_a_gradient_is_refused():
    ids, weight, _ = inputs(3, 4, 8)
    with pytest.raises(RuntimeError, match="embedding is differentiable once"):
        torch.autograd.grad(embedding(ids, weight).sum(), weight, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(place, reentrant):
    ids, weight, _ = inputs(20, 5, 8, device=place.device)

    def block(weight):
        return embedding(ids, weight, backend=place.backend).tanh().sum()

    plain = torch.autograd.grad(block(weight), weight)
    checkpoint(block, weight, use_reentrant=reentrant).backward()
    assert same_bits(plain, [weight.grad])


# ---- 5. refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight \(5,\) must be \(V, H\)"),
        ({"weight": torch.ones(5, 0)}, r"weight \(5, 0\) must be \(V, H\), neither of them 0"),
        ({"ids": torch.ones(2)}, "ids are float32; expected int64 or int32"),
        ({"ids": torch.ones(2, dtype=torch.bool)}, "ids are bool"),
        ({"weight": torch.ones(5, 4, dtype=torch.int64)}, "weight is int64; expected one of"),
        ({"weight": torch.ones(5, 4, device="meta")}, "ids on cpu, weight on meta"),
        ({"padding_idx": 5}, r"padding_idx=5; expected -5 to 4, for weight \(5, 4\)"),
        ({"padding_idx": -6}, "padding_idx=-6"),
        ({"backend": "cda"}, "embedding='cda'; expected one of auto, triton, cpu, eager"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = {"ids": torch.tensor([1, 2]), "weight": torch.ones(5, 4), **change}
    ids, weight = arguments.pop("ids"), arguments.pop("weight")
    with pytest.raises(ValueError, match=message):
        embedding(ids, weight, **arguments)


def test_a_backend_asked_for_by_name_never_falls_back():
    ids, weight, dy = inputs(9, 4, 8, torch.float16)
    with pytest.raises(UnsupportedKernel, match=r"'cpu'.*not float16\. These can: .*eager"):
        embedding(ids, weight, backend="cpu")
    found = embedding(ids, weight)  # auto: the reference
    expected = embedding_expected(ids, weight, dy)["dweight"]
    assert expected.ratio(torch.autograd.grad(found, weight, dy)[0]) <= 1
