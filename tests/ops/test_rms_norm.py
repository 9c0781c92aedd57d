"""rms_norm: each backend against exact values, properties, PyTorch's machinery, refusals.

Edge cases are in test_rms_norm_edges.py; test_interpreter.py runs both on Triton's interpreter.
"""

import contextlib

import hypothesis.strategies as st
import pytest
import torch
from fasttrain_kernels import UnsupportedKernel, native, rms_norm, testing, use
from fasttrain_kernels.ops.rms_norm import reference, self_test
from hypothesis import given, settings
from ops.rms_norm_calls import (
    BF16,
    CPU,
    EPS,
    F32,
    F64,
    STYLES,
    assert_exact,
    call,
    inputs,
    kernel_of,
    same_bits,
)
from torch.library import opcheck

# ---- 1. each backend against exact values --------------------------------------------------------

# One row of one element (all cancellation), an odd width, rows in two dimensions, many narrow rows
# (several a tile), more rows than one chunk of dw, a width of several vectors and a tail.
SHAPES = [(1, 1), (3, 63), (2, 3, 1000), (70, 8), (2, 2051)]
DTYPES = [
    pytest.param((F32, F32, F32), id="fp32"),
    pytest.param((BF16, BF16, BF16), id="bf16"),
    pytest.param((BF16, F32, BF16), id="bf16-weights-fp32"),
    pytest.param((BF16, F32, F32), id="bf16-weights-and-residual-fp32"),
    pytest.param((F32, BF16, BF16), id="fp32-weights-and-residual-bf16"),
]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_exact_values(place, shape, style, dtypes):
    dtype, weight_dtype, residual_dtype = dtypes
    x, weight, _ = inputs(shape, dtype, weight_dtype, device=place.device)
    assert_exact(place, x, weight, None, style)
    x, weight, residual = inputs(shape, dtype, weight_dtype, residual_dtype, place.device)
    assert_exact(place, x, weight, residual, style)


@pytest.mark.parametrize("style", STYLES)
def test_float64_is_computed_in_float64(place, style):
    if place.backend == "triton":
        pytest.skip("Triton kernels compute in float32, and say so")
    assert_exact(place, *inputs((5, 67), F64, residual_dtype=F64, device=place.device), style)


def test_self_test_passes(place):
    kernel = kernel_of(place.backend)
    device = torch.device(place.device)
    assert 0 < self_test.parity(kernel, device, truncating=place.truncating) <= 1


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("style", STYLES)
def test_gradcheck_in_float64(backend, style):
    x, weight, residual = inputs((4, 7), F64, residual_dtype=F64)

    def with_residual(x, weight, residual):
        return rms_norm(x, weight, residual=residual, style=style, backend=backend)

    assert torch.autograd.gradcheck(with_residual, (x, weight, residual))
    assert torch.autograd.gradcheck(lambda x, w: with_residual(x, w, None), (x, weight))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("weight_dtype", [F32, BF16])
@pytest.mark.parametrize("style", STYLES)
def test_is_what_transformers_computes(style, weight_dtype, dtype):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    module = {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm, "olmo2": Olmo2RMSNorm}[style](
        96, eps=EPS
    )
    module.weight.data = inputs((1, 96))[1].detach().to(weight_dtype)
    x = inputs((5, 96), dtype)[0].detach()
    for autocast in (contextlib.nullcontext(), torch.autocast("cpu", BF16)):
        with autocast:
            theirs = module(x)
            eager = rms_norm(x, module.weight, EPS, style=style, backend="eager")
            ours = rms_norm(x, module.weight, EPS, style=style)
        assert torch.equal(eager, theirs) and eager.dtype == theirs.dtype == ours.dtype
        # "llama" makes two roundings where the stored dtype is narrow, and ours may break each tie
        # the other way, at worst one unit in the last place for each.
        units = 2 * 2 * testing.ROUNDOFF[dtype]
        assert ((ours - theirs).abs() <= units * theirs.abs() + 1e-6).all()


def test_no_worse_than_eager_in_bf16():
    x, weight, _ = inputs((64, 1024), BF16)
    dy = torch.randn(64, 1024).to(BF16)
    exact = testing.rms_norm_expected(x, weight, EPS, "llama", dy=dy, output_dtype=BF16)
    error = {}
    for name, function in (
        ("eager", lambda x, w: torch.nn.functional.rms_norm(x, (1024,), w, EPS)),
        ("ours", lambda x, w: rms_norm(x, w, EPS)),
    ):
        x.grad = weight.grad = None
        function(x, weight).backward(dy)
        error[name] = [
            (found.double() - exact[key].value).norm()
            for key, found in (("dx", x.grad), ("dweight", weight.grad))
        ]
    assert all(ours <= 2 * eager for ours, eager in zip(error["ours"], error["eager"], strict=True))


# ---- 2. properties ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 200),
    dtypes=st.sampled_from([(F32, F32), (BF16, BF16), (BF16, F32)]),
    residual_dtype=st.sampled_from([None, F32, BF16]),
    style=st.sampled_from(STYLES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_on_the_cpu(rows, width, dtypes, residual_dtype, style, seed):
    leaves = inputs((rows, width), *dtypes, residual_dtype, seed=seed)
    assert_exact(CPU, *leaves, style)


def test_is_bitwise_repeatable(place):
    leaves = inputs((150, 129), BF16, residual_dtype=BF16, device=place.device)
    first = call(place, *leaves)
    assert all(same_bits(first, call(place, *leaves)) for _ in range(3 if place.truncating else 20))


def test_the_number_of_threads_changes_no_bit():
    leaves = inputs((700, 130), residual_dtype=F32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(CPU, *leaves))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_a_row_alone_equals_the_row_among_others(place):
    x, weight, _ = (t if t is None else t.detach() for t in inputs((37, 96), device=place.device))
    together = rms_norm(x, weight, backend=place.backend)
    for row in (0, 17, 36):
        alone = rms_norm(x[row : row + 1], weight, backend=place.backend)
        assert torch.equal(alone[0], together[row])


def test_scaling_by_a_power_of_two_changes_no_bit(place):
    x, weight, _ = inputs((9, 200), device=place.device)
    plain = rms_norm(x, weight, 0.0, backend=place.backend)
    assert torch.equal(rms_norm(x * 4, weight, 0.0, backend=place.backend), plain)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    assert native.why_not("_C_cpu") is None
    try:
        torch.ops.fasttrain_native.set_cpu_isa(isa)
    except RuntimeError:
        pytest.skip(f"this CPU has no {isa}")
    try:
        for style in STYLES:
            for shape in ((3, 1), (40, 63), (2, 1000)):
                assert_exact(CPU, *inputs(shape, BF16, F32, BF16), style)
                assert_exact(CPU, *inputs(shape, F32, residual_dtype=F32), style)
                assert_exact(CPU, *inputs(shape, F64, residual_dtype=F64), style)
        # Every kind of bfloat16 (normal, denormal, infinite, NaN) is rounded as torch rounds it.
        x, residual = torch.randint(-(2**15), 2**15, (2, 64, 1001)).short().view(BF16)
        total = kernel_of("cpu").forward(x, torch.ones(1001), EPS, residual, "llama")[1]
        torch.testing.assert_close(total, x + residual, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.ops.fasttrain_native.set_cpu_isa("auto")


# ---- 4. PyTorch's machinery ---------------------------------------------------------------------


# What the shapes and dtypes of results hang on: a style with the weight's dtype, a residual.
@pytest.mark.parametrize(
    ("style", "residual_dtype"), [("llama", None), ("gemma", F32), ("olmo2", None)]
)
def test_opcheck(place, style, residual_dtype):
    leaves = inputs((4, 6, 40), BF16, F32, residual_dtype, device=place.device)
    x, weight, residual = (t if t is None else t.detach() for t in leaves)
    for x_like in (x, x.transpose(0, 1), x[:0]):
        res = residual if residual is None else x_like.to(residual.dtype)
        forward = (x_like, weight, EPS, res, style, place.backend)
        opcheck(torch.ops.fasttrain.rms_norm_forward.default, forward)
        y, total, rstd = torch.ops.fasttrain.rms_norm_forward(*forward)
        s = x_like if res is None else total
        every = ((True, True), (True, False), (False, True))
        for needs in every if x_like is x else every[:1]:  # strides of x don't meet with these
            backward = (
                y,
                None if res is None else s,
                s,
                weight,
                rstd,
                style,
                *needs,
                place.backend,
            )
            opcheck(torch.ops.fasttrain.rms_norm_backward.default, backward)


@pytest.mark.slow
def test_torch_compile_in_one_graph(place):
    def block(x, weight, residual):
        y, total = rms_norm(x, weight, residual=residual, backend=place.backend)
        return rms_norm(y, weight, style="gemma", backend=place.backend) + total

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=place.compiler)
    for rows in (3, 8):
        leaves = inputs((rows, 40), residual_dtype=F32, device=place.device)
        plain = torch.autograd.grad(block(*leaves).sum(), leaves)
        assert same_bits(plain, torch.autograd.grad(compiled(*leaves).sum(), leaves))


def test_a_compiled_graph_follows_use():
    x, weight, _ = inputs((3, 8))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: rms_norm(x, w), fullgraph=True, backend="aot_eager")
    compiled(x, weight)
    with use(rms_norm="triton"), pytest.raises(UnsupportedKernel, match="runs on CUDA devices"):
        compiled(x, weight)
    compiled(x, weight)


def test_autocast_leaves_the_norm_in_its_inputs_dtype(place):
    x, weight, _ = inputs((4, 32), BF16, F32, device=place.device)
    with torch.autocast(place.device, BF16):
        y = rms_norm(x, weight, backend=place.backend)
    assert y.dtype == F32  # as LlamaRMSNorm: the next matmul casts
    y.sum().backward()
    assert x.grad.dtype == BF16 and weight.grad.dtype == F32


# ---- 5. refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight \(5,\) must be \(H,\) for x \(\.\.\., H\).*\(2, 4\)"),
        ({"weight": torch.ones(4, 1)}, r"weight \(4, 1\)"),
        ({"x": torch.ones(2, 0), "weight": torch.ones(0)}, r"H > 0; x is \(2, 0\)"),
        ({"x": torch.tensor(1.0)}, r"x is \(\)"),
        ({"residual": torch.ones(4)}, r"residual \(4,\) must have the shape of x, \(2, 4\)"),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, "x is int64; expected one of float32"),
        ({"weight": torch.ones(4, device="meta")}, "weight on meta"),
        ({"style": "lama"}, "style='lama'; expected one of llama, gemma, olmo2"),
        ({"backend": "cda"}, "rms_norm='cda'; expected one of auto, triton, cpu, .*eager"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(4), **change}
    x, weight = arguments.pop("x"), arguments.pop("weight")
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, **arguments)


def test_a_backend_asked_for_by_name_never_falls_back():
    x = torch.ones(2, 4, dtype=torch.float16)
    weight = torch.ones(4, dtype=torch.float16)
    with pytest.raises(UnsupportedKernel, match=r"'cpu'.*not float16\. These can: .*eager"):
        rms_norm(x, weight, backend="cpu")
    assert rms_norm(x, weight).dtype == torch.float16  # auto: the reference


def test_the_cpu_kernel_says_what_it_does_not_serve():
    kernel = kernel_of("cpu")
    problem = reference.Problem(torch.device("cpu"), F64, 8, F32, None, "llama")
    assert kernel.unsupported(problem) == "float64 can't be mixed with another dtype"
    assert "tensors are on cuda" in kernel.unsupported(
        problem._replace(device=torch.device("cuda"))
    )
