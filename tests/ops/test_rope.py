"""rope: each backend against exact values, properties, PyTorch's machinery, refusals.

Edge cases are in test_rope_edges.py; test_interpreter.py runs both on Triton's interpreter.
"""

import math
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from fasttrain_kernels import UnsupportedKernel, native, rope, rope_table, testing, use
from fasttrain_kernels.ops.rope import reference, self_test
from fasttrain_kernels.ops.rope.table import frequencies, positions_of
from hypothesis import given, settings
from ops.rope_calls import (
    BF16,
    CPU,
    F16,
    F32,
    F64,
    STYLES,
    Inputs,
    assert_exact,
    call,
    inputs,
    kernel_of,
    same_bits,
    turn,
)
from torch.library import opcheck

# ---- 1. each backend against exact values --------------------------------------------------------

# The least there is, a rest beside an odd number of pairs, whole vectors, a tail and a rest of 1.
SHAPES = [(1, 1, 1, 2, 2), (2, 3, 1, 15, 6), (1, 5, 2, 64, 64), (1, 2, 2, 77, 76)]
DTYPES = [
    pytest.param((F32, None), id="fp32"),
    pytest.param((BF16, None), id="bf16"),
    pytest.param((F32, F32), id="fp32-norm"),
    pytest.param((BF16, F32), id="bf16-norm-fp32"),
]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_exact_values(place, shape, style, dtypes):
    assert_exact(place, inputs(shape, *dtypes, device=place.device), style, "gemma")


def test_every_norm_style_and_narrow_dtype(place):
    for norm_style, dtype in (("llama", BF16), ("olmo2", F32), ("gemma", F16)):
        if dtype != F16 or place.backend != "cpu":
            given = inputs((2, 2, 1, 12, 8), dtype, dtype, place.device)
            assert_exact(place, given, "half", norm_style)
    if place.backend != "cpu":
        assert_exact(place, inputs((1, 2, 1, 12, 8), F16, device=place.device), "interleaved")


@pytest.mark.parametrize("style", STYLES)
def test_float64_is_computed_in_float64(place, style):
    if place.backend == "triton":
        pytest.skip("Triton kernels compute in float32, and say so")
    for norm_dtype in (None, F64):
        given = inputs((3, 2, 1, 15, 10), F64, norm_dtype, place.device)
        assert_exact(place, given, style, "gemma")


def test_self_test_passes(place):
    kernel, device = kernel_of(place.backend), torch.device(place.device)
    assert 0 < self_test.parity(kernel, device, truncating=place.truncating) <= 1


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("style", STYLES)
def test_gradcheck_in_float64(backend, style):
    plain, normed = inputs((2, 2, 1, 7, 4), F64), inputs((2, 2, 1, 7, 4), F64, F64)
    for made in (plain, normed):

        def function(*leaves, made=made):
            leaves = (*leaves, None, None)[:4]
            where = SimpleNamespace(backend=backend)
            return turn(where, Inputs(*leaves, made.table), style, "gemma")

        assert torch.autograd.gradcheck(function, made.leaves)


def model_heads(shape, dtype):
    """q, k as (1, heads, T, D): transposed slices of one fused projection."""
    tokens, q_heads, k_heads, head_dim = shape
    fused = torch.randn(tokens, q_heads + 2 * k_heads, head_dim).to(dtype)
    q, k, _ = fused.split([q_heads, k_heads, k_heads], 1)
    return q.transpose(0, 1)[None], k.transpose(0, 1)[None]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("model", ["llama", "cohere2"])
def test_is_what_transformers_computes(model, dtype):
    from transformers.models.cohere2 import configuration_cohere2, modeling_cohere2
    from transformers.models.llama import configuration_llama, modeling_llama

    configuration, modeling = {
        "llama": (configuration_llama.LlamaConfig, modeling_llama),
        "cohere2": (configuration_cohere2.Cohere2Config, modeling_cohere2),
    }[model]
    config = configuration(hidden_size=96, num_attention_heads=4, num_hidden_layers=1)
    name = "LlamaRotaryEmbedding" if model == "llama" else "Cohere2RotaryEmbedding"
    embedding = getattr(modeling, name)(config)
    q, k = model_heads((50, 4, 2, 24), dtype)
    positions = torch.arange(50)
    cos, sin = embedding(q.to(dtype), positions[None])
    theirs = modeling.apply_rotary_pos_emb(q, k, cos, sin)

    columns = slice(0, 12) if model == "llama" else slice(0, None, 2)
    style = "half" if model == "llama" else "interleaved"
    table = cos[0][:, columns], sin[0][:, columns]
    ours = rope(q[0].transpose(0, 1), k[0].transpose(0, 1), table=table, style=style)
    # Llama rounds three times, to the stored dtype: two products of at most |x|, and their sum.
    unit = 2 * testing.ROUNDOFF[dtype]
    for mine, their, x in zip(ours, theirs, (q, k), strict=True):
        size = x.abs().amax(-1, keepdim=True).float()
        assert ((mine.transpose(0, 1)[None].float() - their.float()).abs() <= 4 * unit * size).all()
    if dtype == F32:  # and the table itself, within the error of their angles
        made = rope_table(positions, embedding.inv_freq, scaling=embedding.attention_scaling)
        for mine, their in zip(made, table, strict=True):
            assert (mine - their).abs().max() <= 50 * 2 * testing.ROUNDOFF[F32]


# ---- 2. angles ----------------------------------------------------------------------------------


def test_the_table_is_exact_at_long_positions():
    positions = torch.tensor([0, 1, 4095, 2**20 + 1, 2**31 + 7])
    inv_freq = frequencies(5e5, 64, torch.device("cpu"))
    cos, sin = rope_table(positions, inv_freq, scaling=1.25)
    assert cos.dtype == sin.dtype == F32 and cos.shape == (5, 32)
    for row, position in enumerate(positions.tolist()):
        for column in (0, 1, 17, 31):
            angle = position * 5e5 ** (-2 * column / 64)
            limit = 1.25 * testing.ROUNDOFF[F32] + 4 * 2.0**-53 * angle
            assert abs(float(cos[row, column]) - 1.25 * math.cos(angle)) <= limit
            assert abs(float(sin[row, column]) - 1.25 * math.sin(angle)) <= limit
    assert (cos[0] == 1.25).all() and (sin[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_restart_in_each_document(dtype):
    borders = torch.tensor([0, 0, 3, 3, 3, 4, 9], dtype=dtype)  # empty ones first and in between
    assert positions_of(borders, 9).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert positions_of(borders, 11).tolist()[9:] == [0, 1]  # padding
    assert positions_of(borders[:1], 2).tolist() == [0, 1]
    assert positions_of(borders[:1], 0).tolist() == []


def test_all_ways_to_give_the_angles_agree():
    given = inputs((6, 2, 1, 8, 8))
    q, k = given.q.detach(), given.k.detach()
    positions = torch.tensor([0, 1, 0, 1, 2, 3])
    borders = torch.tensor([0, 2, 6], dtype=torch.int32)
    inv_freq = frequencies(100.0, 8, q.device)
    table = rope_table(positions, inv_freq, scaling=0.5)
    expected = rope(q, k, table=table)
    wide = tuple(torch.cat((part, part), 1)[:, :4] for part in table)  # as transformers has them
    for angles in (
        {"positions": positions, "inv_freq": inv_freq, "scaling": 0.5},
        {"positions": positions.int(), "theta": 100.0, "scaling": 0.5},
        {"cu_seqlens": borders, "theta": 100.0, "scaling": 0.5},
        {"cu_seqlens": borders, "inv_freq": inv_freq, "scaling": 0.5},
        {"table": wide},
        {"table": tuple(part.double() for part in table)},
    ):
        assert same_bits(expected, rope(q, k, **angles)), angles
    narrow = [part.to(BF16) for part in table]
    rounded = rope(q, k, table=tuple(part.float() for part in narrow))
    assert same_bits(rounded, rope(q, k, table=tuple(narrow)))


# ---- 3. properties ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 70),
    heads=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    pairs=st.integers(1, 40),
    rest=st.integers(0, 40),
    dtypes=st.sampled_from([(F32, None), (BF16, None), (F32, F32), (BF16, F32), (BF16, BF16)]),
    style=st.sampled_from(STYLES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_on_the_cpu(tokens, heads, pairs, rest, dtypes, style, seed):
    given = inputs((tokens, *heads, 2 * pairs + rest, 2 * pairs), *dtypes, seed=seed)
    assert_exact(CPU, given, style, "gemma")


@pytest.mark.parametrize("norm_dtype", [None, F32])
def test_is_bitwise_repeatable(place, norm_dtype):
    tokens, times = (3, 1) if place.truncating else (150, 10)
    given = inputs((tokens, 3, 2, 16, 12), BF16, norm_dtype, place.device)
    first = call(place, given)
    assert all(same_bits(first, call(place, given)) for _ in range(times))


def test_the_number_of_threads_changes_no_bit():
    given = inputs((700, 5, 3, 30, 26), F32, F32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(CPU, given))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@pytest.mark.parametrize("style", STYLES)
def test_what_is_not_turned_passes_bit_for_bit(place, style):
    given = inputs((2, 2, 1, 16, 6), BF16, device=place.device)
    # Every kind of NaN too, which a way through float32 could change.
    bits = torch.randint(-(2**15), 2**15, (2, 2, 10), dtype=torch.int16, device=place.device)
    bits[0, 0, :2] = torch.tensor([0x7F81, -0x007F], dtype=torch.int16)
    with torch.no_grad():
        given.q[..., 6:] = bits.view(BF16)
    outputs = turn(place, given, style)
    dq = torch.autograd.grad(outputs[0], given.q, given.q.detach())[0]
    assert torch.equal(outputs[0][..., 6:].contiguous().view(torch.int16), bits)
    assert torch.equal(dq[..., 6:].contiguous().view(torch.int16), bits)


def test_angles_of_zero_and_back(place):
    given = inputs((2, 2, 1, 8, 8), device=place.device)
    still = given._replace(table=(torch.ones_like(given.table[0]), 0 * given.table[1]))
    assert same_bits(turn(place, still), given[:2])
    quarter = given._replace(table=(0 * given.table[0], torch.ones_like(given.table[0])))
    q, k = given.q.detach(), given.k.detach()
    assert torch.equal(turn(place, quarter)[0], torch.cat((-q[..., 4:], q[..., :4]), -1))
    neighbours = torch.stack((-k[..., 1::2], k[..., ::2]), -1).flatten(-2)
    assert torch.equal(turn(place, quarter, "interleaved")[1], neighbours)


def test_a_token_alone_equals_the_token_among_others(place):
    given = inputs((4, 2, 3, 20, 16), F32, F32, place.device)
    together = turn(place, given)
    for token in (0, 3):
        rows = slice(token, token + 1)
        table = tuple(part[rows] for part in given.table)
        alone = turn(place, given._replace(q=given.q[rows], k=given.k[rows], table=table))
        assert same_bits(alone, [out[rows] for out in together])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    assert native.why_not("_C_cpu") is None
    try:
        torch.ops.fasttrain_native.set_cpu_isa(isa)
    except RuntimeError:
        pytest.skip(f"this CPU has no {isa}")
    try:
        for style in STYLES:
            for shape in ((1, 1, 1, 2, 2), (3, 2, 1, 83, 76), (40, 2, 2, 64, 64)):
                for dtype, norm_dtype in ((F32, None), (BF16, F32), (F64, F64), (BF16, None)):
                    assert_exact(CPU, inputs(shape, dtype, norm_dtype), style, "gemma")
    finally:
        torch.ops.fasttrain_native.set_cpu_isa("auto")


# ---- 4. PyTorch's machinery ---------------------------------------------------------------------


@pytest.mark.parametrize("norm_dtype", [None, F32])
def test_opcheck(place, norm_dtype):
    given = inputs(
        (2 if place.backend != "triton" else 1, 3, 2, 8, 6), BF16, norm_dtype, place.device
    )
    q, k, q_norm, k_norm = (t if t is None else t.detach() for t in given[:4])
    options = (1e-6, "llama", "half")
    arguments = (*given.table, q_norm, k_norm, *options)
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    opcheck(torch.ops.fasttrain.rope_forward.default, (strided, k, *arguments, place.backend))
    saved = (None, None) if q_norm is None else (q, k)
    backward = torch.ops.fasttrain.rope_backward.default
    has_norm = q_norm is not None
    needs = [True, True, has_norm, has_norm]
    opcheck(backward, (q, strided[:, :2], *saved, *arguments, needs, place.backend))
    needs = [False, not has_norm, False, has_norm]
    cheap = ("test_schema", "test_faketensor")
    opcheck(backward, (None, k, *saved, *arguments, needs, place.backend), test_utils=cheap)


def test_torch_compile_in_one_graph():
    def block(q, k, q_norm, k_norm, borders):
        norms = {"q_norm": q_norm, "k_norm": k_norm}
        q, k = rope(q, k, cu_seqlens=borders, theta=1e4, **norms)
        return q.sum() + (k * k).sum()

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 3):
        given = inputs((tokens, 2, 1, 8, 8), F32, F32)
        borders = torch.tensor([0, 1, tokens], dtype=torch.int32)
        plain = torch.autograd.grad(block(*given.leaves, borders), given.leaves)
        found = torch.autograd.grad(compiled(*given.leaves, borders), given.leaves)
        assert same_bits(plain, found)


def test_a_compiled_graph_follows_use():
    given = inputs((3, 2, 1, 8, 8))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, c, s: rope(q, k, table=(c, s)), fullgraph=True, backend="aot_eager"
    )
    compiled(*given.leaves, *given.table)
    with use(rope="triton"), pytest.raises(UnsupportedKernel, match="runs on CUDA devices"):
        compiled(*given.leaves, *given.table)
    compiled(*given.leaves, *given.table)


# ---- 5. refusals --------------------------------------------------------------------------------

ONES = torch.ones(2, 4, 8)
TABLE = (torch.ones(2, 4), torch.ones(2, 4))
ANGLES = {"table": None, "positions": torch.arange(2), "theta": 1e4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 8)}, r"q is \(2, 8\) of float32, k \(2, 4, 8\)"),
        ({"k": torch.ones(3, 4, 8)}, r"one T.*k \(3, 4, 8\)"),
        ({"k": torch.ones(2, 4, 6)}, r"one D"),
        ({"k": ONES.to(BF16)}, r"one dtype.*k \(2, 4, 8\) of bfloat16"),
        ({"q": ONES.long(), "k": ONES.long()}, "q is int64; expected one of float32"),
        ({"k": ONES.to("meta")}, "one device"),
        ({"style": "halves"}, "style='halves'; expected one of half, interleaved"),
        ({"norm_style": "lama"}, "norm_style='lama'; expected one of llama, gemma, olmo2"),
        ({"q_norm": torch.ones(8)}, "k_norm is missing"),
        ({"q_norm": torch.ones(8), "k_norm": torch.ones(4)}, r"k_norm \(4,\) must be \(D,\), \(8,"),
        ({"table": (torch.ones(2, 5),) * 2}, r"cos \(2, 5\).*0 < R <= D"),
        ({"table": (torch.ones(2, 0),) * 2}, r"cos \(2, 0\)"),
        ({"table": (torch.ones(3, 4),) * 2}, r"cos \(3, 4\)"),
        ({"table": (torch.ones(2, 4), torch.ones(2, 3))}, r"sin \(2, 3\)"),
        ({"table": (torch.ones(2, 4).long(),) * 2}, "cos is int64"),
        ({"table": (torch.ones(2, 4, requires_grad=True), torch.ones(2, 4))}, "wants a gradient"),
        ({"theta": 1e4}, "a table holds all angles; drop theta"),
        ({"scaling": 2.0}, "drop scaling"),
        ({"table": None}, "got none"),
        ({"table": None, "positions": torch.arange(2)}, "got positions"),
        ({"table": None, "theta": 1e4}, "got theta"),
        (ANGLES | {"cu_seqlens": torch.tensor([0, 2])}, "got positions, cu_seqlens, theta"),
        (ANGLES | {"inv_freq": torch.ones(4)}, "got positions, theta, inv_freq"),
        (ANGLES | {"positions": torch.ones(2)}, r"positions \(2,\) of float32"),
        (ANGLES | {"positions": torch.arange(3)}, r"cos \(3, 4\)"),
        (ANGLES | {"theta": None, "inv_freq": torch.arange(4)}, r"inv_freq \(4,\) of int64"),
        (ANGLES | {"theta": None, "inv_freq": torch.ones(4, requires_grad=True)}, "gradient"),
        ({"table": None, "cu_seqlens": torch.tensor([1, 2]), "theta": 1.0}, "from 0 to at most 2"),
        ({"table": None, "cu_seqlens": torch.tensor([0, 3]), "theta": 1.0}, "goes from 0 to 3"),
        ({"table": None, "cu_seqlens": torch.tensor([0, 2, 1]), "theta": 1.0}, "must rise"),
        ({"table": None, "cu_seqlens": torch.arange(0), "theta": 1.0}, "cu_seqlens is empty"),
        ({"backend": "cda"}, "rope='cda'; expected one of auto, triton, cpu, .*eager"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = {"q": ONES, "k": ONES, "table": TABLE, **change}
    q, k = arguments.pop("q"), arguments.pop("k")
    with pytest.raises(ValueError, match=message):
        rope(q, k, **arguments)


def test_a_backend_asked_for_by_name_never_falls_back():
    given = inputs((2, 1, 1, 4, 4), F16)
    with pytest.raises(UnsupportedKernel, match=r"'cpu'.*not float16\. These can: .*eager"):
        turn(CPU, given)
    assert rope(given.q, given.k, table=given.table)[0].dtype == F16  # auto: the reference


def test_the_cpu_kernel_says_what_it_does_not_serve():
    problem = reference.Problem(torch.device("cuda"), F32, 64)
    assert "tensors are on cuda" in kernel_of("cpu").unsupported(problem)
