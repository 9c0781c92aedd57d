"""What others have made, as backends: the compiled definition, and liger-kernel by stand-ins that
check how it is called and compute with the reference."""

import os
import sys
import types

import pytest
import torch
from fasttrain_kernels import liger, proof
from fasttrain_kernels.compiled import _program, compiled
from fasttrain_kernels.ops.rms_norm import compile_provider, liger_provider, reference
from fasttrain_kernels.ops.rms_norm import self_test as rms_norm_test
from fasttrain_kernels.ops.rms_norm.op import describe
from fasttrain_kernels.ops.swiglu import liger_provider as swiglu_provider
from fasttrain_kernels.ops.swiglu import reference as glu_reference
from fasttrain_kernels.registry import OPS, find

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="about kernels that are not interpreted"
)


# --- torch.compile ------------------------------------------------------------------------------


def test_the_compiled_definition_passes_the_self_test():
    """One form of one op, for each costs seconds."""
    op = find("swiglu")
    problem = op.describe(device=CPU, dtype=torch.float32, width=64)
    module = op.candidate("compile").module
    assert proof.in_this_process(op.self_test, module, problem) <= 1.0


def test_roundings_are_made_as_they_are_written(monkeypatch):
    """Inductor leaves that of a bfloat16 sum out, in programs of one row, unless it is told."""
    op = find("rms_norm")
    monkeypatch.setattr(rms_norm_test, "SHAPES", ((1, 24),))
    problem = describe(device=CPU, dtype=torch.bfloat16, width=24, residual_dtype=torch.bfloat16)
    assert proof.in_this_process(op.self_test, op.candidate("compile").module, problem) <= 1.0


def test_everything_that_is_compiled_is_whole(monkeypatch):
    """The graph that would be compiled, run as it is: there is one, and no more."""
    _program.cache_clear()
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, real=torch.compile, options=None, **o: real(f, backend="eager", **o),
    )
    for name in ("rms_norm", "rope", "geglu"):
        op = find(name)
        problem = op.describe(device=CPU, dtype=torch.float32, **op.example)
        fresh = types.ModuleType(f"fresh_{name}")
        source = sys.modules[op.candidate("compile").load().__name__].reference
        fresh.unsupported = lambda problem: None
        fresh.forward, fresh.backward = compiled(source.forward), compiled(source.backward)
        monkeypatch.setitem(sys.modules, fresh.__name__, fresh)
        assert proof.in_this_process(op.self_test, fresh.__name__, problem) <= 1.0
    _program.cache_clear()


def test_a_width_is_compiled_once_whatever_the_rows_and_however_many_there_are(monkeypatch):
    """Dynamo gives up after 8 programs of one code object, and soon takes all sizes for dynamic."""
    made = []

    def noting(graph, inputs):
        made.append(graph)
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, options: real(f, backend=noting))
    _program.cache_clear()
    widths = range(2, 2 + 2 * torch._dynamo.config.recompile_limit)
    for rows in (14, 17):
        for width in widths:
            x = torch.randn(rows, width, requires_grad=rows == 14)
            y = compile_provider.forward(x, torch.ones(width), 1e-6, None, "llama")[0]
            torch.testing.assert_close(
                y, reference.forward(x, torch.ones(width), 1e-6, None, "llama")[0]
            )
    _program.cache_clear()
    assert len(made) == len(widths)


def test_it_is_taken_by_name_or_by_time_only():
    facts = {"device": "cpu", "dtype": torch.float32, "width": 64}
    row = find("rms_norm").choose(describe(**facts))
    assert row.backend != "compile"
    assert {r.backend: r.reason for r in row.rejected}["compile"].startswith("compiles for seconds")


def test_it_wants_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    reason = compile_provider.unsupported(describe(device=CPU, dtype=torch.float32, width=8))
    assert reason == "torch.compile wants a C++ compiler, and there is no '/nowhere/c++'"
    reason = compile_provider.unsupported(describe(device="meta", dtype=torch.float32, width=8))
    assert "on meta" in reason


# --- liger-kernel -------------------------------------------------------------------------------


def rms_norm_forward(X, W, eps, offset, casting_mode, row_mode):
    assert X.is_contiguous() and W.is_contiguous() and row_mode is None
    style = {(0.0, 0): "llama", (1.0, 1): "gemma"}[offset, casting_mode]
    y, _, rstd = reference.forward(X, W, eps, None, style)
    return y, X, rstd, 8, 4, casting_mode


def rms_norm_backward(
    dY, X, W, RSTD, offset, casting_mode, BLOCK_SIZE, num_warps, in_place, row_mode, needs_dw=None
):
    assert not in_place and (BLOCK_SIZE, num_warps) == ("block", "warps")
    style = {(0.0, 0): "llama", (1.0, 1): "gemma"}[offset, casting_mode]
    return reference.backward(dY, None, X, W, RSTD, style, True, True)


def swiglu_forward(a, b, gate_multiplier=1.0):
    assert a.is_contiguous() and b.is_contiguous()
    c = torch.empty_like(a)
    glu_reference.forward(a, b, "silu", c)
    return a, b, c


def swiglu_backward(a, b, dc, gate_multiplier=1.0):
    """As theirs: over its inputs."""
    da, db = torch.empty_like(a), torch.empty_like(b)
    glu_reference.backward(dc, a, b, "silu", da, db)
    return a.copy_(da), b.copy_(db)


@pytest.fixture
def installed(monkeypatch):
    """As if liger-kernel were there, and the CPU a GPU."""
    functions = {
        "rms_norm": [rms_norm_forward, rms_norm_backward],
        "swiglu": [swiglu_forward, swiglu_backward],
    }
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, found in functions.items():
        module = types.ModuleType(f"liger_kernel.ops.{name}")
        vars(module).update({function.__name__: function for function in found})
        monkeypatch.setitem(sys.modules, module.__name__, module)
    utils = types.ModuleType("liger_kernel.ops.utils")
    utils.calculate_settings = lambda width: ("block", "warps")
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.setattr(liger.launcher, "why_not_gpu", lambda device: None)
    monkeypatch.setattr(liger.launcher, "why_not", lambda: None)


@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
def test_liger_is_called_as_it_wants_and_gives_what_all_backends_give(op, installed):
    module = find(op).candidate("liger").module
    assert 0 < proof.full_parity(find(op).self_test, module, CPU) <= 1.0


def test_what_liger_does_not_serve_has_a_reason(installed):
    def why(**facts):
        return liger_provider.unsupported(describe(**({"device": CPU, "width": 64} | facts)))

    assert why(dtype=torch.float32) is None
    assert why(dtype=torch.float32, style="olmo2") == "knows llama, gemma, not olmo2"
    assert why(dtype=torch.float32, residual_dtype=torch.float32) == "adds no residual"
    assert "wants weights of the rows' dtype" in why(
        dtype=torch.bfloat16, weight_dtype=torch.float32
    )
    assert "not float64" in why(dtype=torch.float64)
    assert "up to 65536" in why(dtype=torch.float32, width=70000)
    gelu = find("geglu").describe(device=CPU, dtype=torch.float32, activation="gelu_tanh")
    assert swiglu_provider.unsupported(gelu) == "its gelu_tanh loses small values"


def test_another_version_of_liger_is_a_reason_not_a_crash(installed, monkeypatch):
    problem = describe(device=CPU, dtype=torch.float32, width=64)
    module = sys.modules["liger_kernel.ops.rms_norm"]
    monkeypatch.setattr(module, "rms_norm_forward", lambda X, W, eps: None)
    assert "this version's rms_norm_forward takes (X, W, eps)" in liger_provider.unsupported(
        problem
    )
    monkeypatch.delattr(module, "rms_norm_forward")
    assert "this version is not known here" in liger_provider.unsupported(problem)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    assert liger_provider.unsupported(problem) == "liger-kernel is not installed"


# --- all of them --------------------------------------------------------------------------------


def test_who_varies_says_so_where_it_does():
    attention = OPS["packed_attention"]
    for device, expected in (("cuda", {"flash-attn", "varlen", "sdpa"}), ("cpu", set())):
        problem = attention.describe(device=device, dtype=torch.float32, **attention.example)
        modules = {c.name: c.load() for c in attention.candidates}
        varying = {
            name
            for name, module in modules.items()
            if hasattr(module, "varies") and module.varies(problem) is not None
        }
        assert varying == expected


def test_providers_are_marked_as_such():
    ours = {"triton", "cuda", "cpu", "eager"}
    for op in OPS.values():
        assert {c.name for c in op.candidates if not c.provider} <= ours
        assert not {c.name for c in op.candidates if c.provider} & ours
