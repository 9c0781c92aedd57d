"""swiglu and geglu: each backend against exact values, properties, PyTorch's machinery, refusals.

Edge cases are in test_swiglu_edges.py, what geglu alone has in test_geglu.py; test_interpreter.py
runs them on Triton's interpreter.
"""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import UnsupportedKernel, native, swiglu, use
from fasttrain_kernels.ops.swiglu import reference, self_test
from fasttrain_kernels.testing_glu import glu_expected
from hypothesis import given, settings
from ops.glu_calls import (
    BF16,
    CPU,
    F32,
    F64,
    GLU,
    LAYOUTS,
    assert_exact,
    call,
    inputs,
    kernel_of,
    on,
    same_bits,
)
from torch.library import opcheck

ACTIVATIONS = pytest.mark.parametrize("activation", GLU)

# ---- 1. each backend against exact values --------------------------------------------------------

# One element, an odd width, rows in two dimensions, many narrow rows, more than one block of a row.
SHAPES = [(1, 1), (3, 63), (2, 3, 100), (70, 8), (2, 2051)]
BLOCK = 16384  # of a row, in C++


@pytest.mark.parametrize("dtype", [F32, BF16])
@ACTIVATIONS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_exact_values(place, shape, activation, dtype):
    tensors = inputs(shape, dtype, place.device)
    # Rows that lie apart take a program each, which Triton's interpreter is slow at.
    for layout in LAYOUTS if not place.truncating else LAYOUTS[:1]:
        assert_exact(place, activation, *tensors, layout)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@ACTIVATIONS
def test_matches_exact_values_from_one_tail_to_the_other(place, activation, dtype):
    """Where exponentials vanish and where they would overflow."""
    if place.backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernel serves no float16, and says so")
    gate = torch.cat([torch.linspace(-110, 110, 1501), torch.tensor([-3e4, -500.0, 500.0, 3e4])])
    gate = torch.cat([gate, torch.linspace(-7, 7, 1501), torch.tensor([0.0, -0.0, 1e-7, -1e-7])])
    gate, up, dy = (t.to(place.device, dtype) for t in (gate, torch.ones(3010), torch.ones(3010)))
    assert_exact(place, activation, gate, up, dy)


@ACTIVATIONS
def test_float64_is_computed_in_float64(place, activation):
    if place.backend == "triton":
        pytest.skip("Triton kernels compute in float32, and say so")
    assert_exact(place, activation, *inputs((5, 67), F64, place.device))
    assert_exact(place, activation, *inputs((5, 67), F64, place.device), "packed")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_several_blocks(layout):
    assert_exact(CPU, "silu", *inputs((2, BLOCK + 37)), layout)


def test_self_test_passes(place):
    kernel, device = kernel_of(place.backend), torch.device(place.device)
    assert 0 < self_test.parity(kernel, device, truncating=place.truncating) <= 1


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@ACTIVATIONS
def test_gradcheck_in_float64(backend, activation):
    gate, up, _ = (t.requires_grad_() for t in inputs((3, 6), F64, spread=1.5))

    def glu(*tensors):
        return GLU[activation](*tensors, backend=backend)

    assert torch.autograd.gradcheck(glu, (gate, up))
    packed = torch.cat([gate, up], -1).detach().requires_grad_()
    assert torch.autograd.gradcheck(glu, (packed,))


TORCH = {
    "silu": F.silu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "gelu": F.gelu,
}


@ACTIVATIONS
def test_the_definition_is_torchs(activation):
    gate, up, dy = inputs((40, 50), F64, spread=2.0)
    leaves = [t.requires_grad_() for t in (gate, up)]
    y = TORCH[activation](gate) * up
    theirs = y.detach(), *torch.autograd.grad(y, leaves, dy)
    ours = call(on("eager"), activation, gate, up, dy)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@ACTIVATIONS
def test_no_farther_from_exact_values_than_transformers_in_bf16(activation, backend):
    from transformers.activations import ACT2FN

    name = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}[activation]
    gate, up, dy = inputs((64, 1024), BF16, spread=1.0)
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    y = ACT2FN[name](leaves[0]) * leaves[1]  # as LlamaMLP, GemmaMLP
    theirs = y.detach(), *torch.autograd.grad(y, leaves, dy)
    ours = call(on(backend), activation, gate, up, dy)
    exact = glu_expected(gate, up, activation, dy)
    for key, one, other in zip(("y", "dgate", "dup"), ours, theirs, strict=True):
        error, reach = ((t.double() - exact[key].value).norm() for t in (one, other))
        assert error <= reach, key


# ---- 2. properties ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 100),
    dtype=st.sampled_from([F32, BF16, F64]),
    activation=st.sampled_from(list(GLU)),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_any_shape_on_the_cpu(rows, width, dtype, activation, layout, seed):
    assert_exact(CPU, activation, *inputs((rows, width), dtype, seed=seed), layout)


def test_is_bitwise_repeatable(place):
    tensors = inputs((30, 129), BF16, place.device)
    first = call(place, "silu", *tensors)
    assert all(same_bits(first, call(place, "silu", *tensors)) for _ in range(3))


@ACTIVATIONS
@pytest.mark.parametrize("layout", ["whole", "halves"])
def test_the_number_of_threads_changes_no_bit(activation, layout):
    tensors = inputs((131, 517))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(CPU, activation, *tensors, layout))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@ACTIVATIONS
def test_the_layout_changes_no_bit(place, activation):
    tensors = inputs((3, 1029), BF16, place.device)
    whole, halves, packed = (call(place, activation, *tensors, layout) for layout in LAYOUTS)
    assert same_bits(whole, halves) and same_bits(whole, packed)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    assert native.why_not("_C_cpu") is None
    try:
        torch.ops.fasttrain_native.set_cpu_isa(isa)
    except RuntimeError:
        pytest.skip(f"this CPU has no {isa}")
    try:
        for activation in GLU:
            for dtype in (F32, BF16, F64):
                for shape in ((3, 1), (40, 63), (2, 1000)):
                    assert_exact(CPU, activation, *inputs(shape, dtype))
                assert_exact(CPU, activation, *inputs((5, 67), dtype), "packed")
    finally:
        torch.ops.fasttrain_native.set_cpu_isa("auto")


# ---- 3. what is kept and what is copied ----------------------------------------------------------


def test_saves_its_inputs_and_nothing_else(place):
    gate, up, _ = (t.requires_grad_() for t in inputs((4, 40), device=place.device))
    packed = torch.cat([gate, up], -1).detach().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        swiglu(gate, up, backend=place.backend)
        swiglu(packed, backend=place.backend)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (gate, up, packed)]


def test_halves_of_a_projection_are_not_copied(place, monkeypatch):
    kernel, given_tensors = kernel_of(place.backend), []

    def watch(name):
        real = getattr(kernel, name)

        def watched(*arguments):
            given_tensors.append([t.data_ptr() for t in arguments if isinstance(t, torch.Tensor)])
            real(*arguments)

        monkeypatch.setattr(kernel, name, watched)

    watch("forward")
    watch("backward")
    projection = torch.randn(2, 5, 80, device=place.device).requires_grad_()
    dy = torch.randn(2, 5, 160, device=place.device)[..., :40]  # its rows lie apart, too
    halves = projection.chunk(2, -1)
    y = swiglu(*halves, backend=place.backend)
    dgate, dup = torch.autograd.grad(y, halves, dy)
    packed_y = swiglu(projection, backend=place.backend)
    (gradient,) = torch.autograd.grad(packed_y, projection, dy)

    inputs_at = [t.data_ptr() for t in halves]
    written = [(y,), (dgate, dup), (packed_y,), gradient.chunk(2, -1)]
    for got, upstream, results in zip(given_tensors, ([], [dy], [], [dy]), written, strict=True):
        before, after = ([t.data_ptr() for t in each] for each in (upstream, results))
        assert got == [*before, *inputs_at, *after]


# ---- 4. PyTorch's machinery ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [lambda t: t.transpose(0, 1), lambda t: t[:0]], ids=["transposed", "empty"]
)
def test_opcheck(place, change):
    gate, up, dy = (change(t) for t in inputs((2, 2, 40), BF16, place.device))
    forward, backward = (
        getattr(torch.ops.fasttrain, f"glu_{name}").default for name in ("forward", "backward")
    )
    tail = ("swiglu", "silu")
    opcheck(forward, (gate, up, *tail, place.backend))
    opcheck(forward, (gate, None, *tail, place.backend))
    needs = (gate.numel() > 0, True)
    opcheck(backward, (dy, gate, up, *tail, *needs, place.backend))
    opcheck(backward, (dy[..., :20], gate, None, *tail, True, False, place.backend))


def test_torch_compile_in_one_graph(place):
    def block(gate, up, packed):
        y = swiglu(gate, up, backend=place.backend) + swiglu(packed, backend=place.backend)
        return GLU["gelu"](y, up, backend=place.backend)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3):
        gate, up, _ = inputs((rows, 40), device=place.device)
        leaves = [t.requires_grad_() for t in (gate, up, torch.cat([up, gate], -1))]
        plain = torch.autograd.grad(block(*leaves).sum(), leaves)
        assert same_bits(plain, torch.autograd.grad(compiled(*leaves).sum(), leaves))


def test_a_compiled_graph_follows_use():
    gate, up, _ = inputs((3, 8))
    torch._dynamo.reset()
    compiled = torch.compile(lambda g, u: swiglu(g, u), fullgraph=True, backend="aot_eager")
    compiled(gate, up)
    with use(swiglu="triton"), pytest.raises(UnsupportedKernel, match="runs on CUDA devices"):
        compiled(gate, up)
    with use(geglu="eager"):
        compiled(gate, up)


# ---- 5. refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.ones(2, 5)}, r"up \(2, 5\) must have the shape of gate, \(2, 4\)"),
        ({"up": torch.ones(4)}, r"up \(4,\) must have the shape of gate, \(2, 4\)"),
        (
            {"gate": torch.ones(2, 0), "up": torch.ones(2, 0)},
            r"gate \(2, 0\) must be \(\.\.\., I\)",
        ),
        ({"gate": torch.tensor(1.0)}, r"gate \(\) must be \(\.\.\., I\) with I > 0"),
        ({"gate": torch.ones(2, 5), "up": None}, r"side by side, \(\.\.\., 2I\); it is \(2, 5\)"),
        ({"gate": torch.ones(2, 4).long()}, "gate is int64; expected one of float32"),
        ({"up": torch.ones(2, 4, dtype=BF16)}, "up is bfloat16; expected gate's float32"),
        ({"up": torch.ones(2, 4, device="meta")}, "gate on cpu, up on meta"),
        ({"backend": "cda"}, "swiglu='cda'; expected one of auto, triton, cpu, .*eager"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = {"gate": torch.ones(2, 4), "up": torch.ones(2, 4), **change}
    with pytest.raises(ValueError, match=message):
        swiglu(**arguments)


def test_a_backend_asked_for_by_name_never_falls_back():
    gate = torch.ones(2, 4, dtype=torch.float16)
    with pytest.raises(UnsupportedKernel, match=r"'cpu'.*not float16\. These can: .*eager"):
        swiglu(gate, gate, backend="cpu")
    assert swiglu(gate, gate).dtype == torch.float16  # auto: the reference


def test_kernels_say_what_they_do_not_serve():
    on_gpu = reference.Problem(torch.device("cuda"), F32)
    assert "tensors are on cuda" in kernel_of("cpu").unsupported(on_gpu)
