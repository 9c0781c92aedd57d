"""The attention kernels of others: what is handed to them and how it is read, on a machine that has
none of them. Stand-ins compute in their place; torch's own ops are called through their schemas."""

import math
import sys
from types import ModuleType

import pytest
import torch
from fasttrain_kernels import DocumentLayout, choose, launcher
from fasttrain_kernels.ops.packed_attention import (
    flash_attn_provider,
    flex_provider,
    sdpa_provider,
    varlen_provider,
)
from fasttrain_kernels.ops.packed_attention.op import describe
from fasttrain_kernels.ops.packed_attention.reference import Documents, Mask
from fasttrain_kernels.testing_attention import packed_attention_expected
from ops.attention_calls import BF16, EAGER, F32, F64, Attention, leaves_of, offsets_of, upstream
from ops.flash_stand_ins import NAMES, VERSIONS, attention, gradients

CALLS = {
    "causal": ((4, 2, 16), Attention((3, 0, 20, 1))),
    "full": ((2, 2, 16), Attention((3, 0, 20, 1), causal=False)),
    "one document": ((2, 1, 16), Attention((23,))),
    "window": ((2, 1, 16), Attention((3, 20), window=4)),
    "window 1": ((2, 1, 16), Attention((3, 20), window=1)),
    "window, both sides": ((2, 1, 16), Attention((3, 20), causal=False, window=4)),
    "negative scale": ((2, 1, 16), Attention((3, 20), scale=-0.3)),
    "scale zero": ((2, 1, 16), Attention((3, 20), scale=0.0)),
    "softcap": ((2, 1, 16), Attention((3, 20), softcap=2.0)),
}
WITHOUT_SOFTCAP = [name for name in CALLS if name != "softcap"]


def assert_right(provider, case, dtype=BF16):
    """A provider's module gives the exact values, within what roundings allow."""
    shape, call = CALLS[case]
    q, k, v = (t.detach() for t in leaves_of(EAGER, shape, call, dtype)[:3])
    do = upstream(q)
    layout = DocumentLayout(call.lengths)
    documents = Documents(offsets_of(call), layout.offsets, layout.tiles)
    scale = shape[2] ** -0.5 if call.scale is None else call.scale
    mask = Mask(call.causal, call.window, call.softcap, scale)
    o, lse = provider.forward(q, k, v, documents, mask, None)
    assert o.is_contiguous() and lse.is_contiguous()
    dq, dk, dv, dsinks = provider.backward(do, q, k, v, o, lse, documents, mask, None)
    assert dsinks.shape == (0,)
    expected = packed_attention_expected(q, k, v, call, do=do, o=o)
    for name, found in {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}.items():
        assert expected[name].ratio(found) <= 1, name


# ---- torch's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WITHOUT_SOFTCAP)
def test_varlen_through_torchs_real_op(case):
    def forward(q, k, v, begins, ends, max_q, max_k, dropout, causal, debug, **options):
        assert begins is ends and max_q == max_k and dropout == 0 and not debug
        window = options["window_size_left"], options["window_size_right"]
        o, lse = attention(q, k, v, begins, max_q, causal, *window, options["scale"])
        return o, lse, q.new_empty(0), q.new_empty(0), q.new_empty(0)

    def backward(do, q, k, v, o, lse, begins, ends, max_q, max_k, dropout, causal, *state, **named):
        assert max_q == max_k and dropout == 0
        window = named["window_size_left"], named["window_size_right"]
        return gradients(do, q, k, v, o, lse, begins, max_q, causal, *window, named["scale"])

    with torch.library._scoped_library("aten", "IMPL") as aten:
        aten.impl("_flash_attention_forward", forward, "CPU")
        aten.impl("_flash_attention_backward", backward, "CPU")
        assert_right(varlen_provider, case)


@pytest.mark.parametrize("lengths", [(23,), (3, 0, 20)], ids=str)
def test_sdpa_on_a_gpu_has_the_right_shapes(lengths):
    """Through torch's own shape functions: there are no values."""
    q = torch.empty(23, 4, 16, dtype=BF16, device="meta")
    k = torch.empty(23, 2, 16, dtype=BF16, device="meta")
    layout = DocumentLayout(lengths)
    documents = Documents(layout.offsets.to("meta"), layout.offsets, layout.tiles)
    mask = Mask(True, None, None, -0.25)
    o, lse = sdpa_provider.forward(q, k, k, documents, mask, None)
    assert (o.shape, lse.shape) == ((23, 4, 16), (4, 23)) and o.is_contiguous()
    dq, dk, dv, _ = sdpa_provider.backward(o, q, k, k, o, lse, documents, mask, None)
    assert [t.shape for t in (dq, dk, dv)] == [q.shape, k.shape, k.shape]


def copied(run):
    """How many elements torch copies while `run` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        run()
    copies = [event for event in profile.events() if event.name == "aten::copy_"]
    return sum(math.prod(event.input_shapes[0]) for event in copies)


def test_sdpa_of_one_document_copies_no_tensor():
    shape, call = (4, 4, 32), Attention((70,))
    q, k, v = (t.detach() for t in leaves_of(EAGER, shape, call)[:3])
    layout = DocumentLayout(call.lengths)
    documents, mask = (
        Documents(layout.offsets, layout.offsets, layout.tiles),
        Mask(True, None, None, 0.2),
    )

    def run():
        o, lse = sdpa_provider.forward(q, k, v, documents, mask, None)
        sdpa_provider.backward(o, q, k, v, o, lse, documents, mask, None)

    assert copied(run) <= 4 * 70  # lse


# ---- FlexAttention -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CALLS)
def test_flex_uncompiled(monkeypatch, case):
    from torch.nn.attention import flex_attention as flex

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # it refuses gradients on CPUs
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    found = (flex.flex_attention, flex.create_block_mask)
    monkeypatch.setattr(flex_provider, "_compiled", lambda: found)
    assert_right(flex_provider, case, F32)


# ---- flash-attn ----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Makes this machine one with a GPU of a compute capability, as far as providers ask, and puts
    versions of flash-attn there."""

    def make(capability, *versions):
        monkeypatch.delenv("FASTTRAIN_KERNELS", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(launcher, "_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        for version in versions:
            name, *functions = VERSIONS[version]
            module = ModuleType(name)
            for attribute, function in zip(NAMES[version], functions, strict=True):
                setattr(module, attribute, function)
            parents = name.split(".")[:-1]
            for depth in range(len(parents)):
                parent = ".".join(parents[: depth + 1])
                if parent not in sys.modules:
                    package = ModuleType(parent)
                    package.__path__ = []
                    monkeypatch.setitem(sys.modules, parent, package)
            monkeypatch.setitem(sys.modules, name, module)

    flash_attn_provider._find_for.cache_clear()
    yield make
    flash_attn_provider._find_for.cache_clear()


def problem(**facts):
    return describe(
        **{"device": "cuda", "dtype": BF16, "head_dim": 64, "query_heads": 4, "key_heads": 2}
        | facts
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CALLS)
def test_flash_attn(gpu, case, version):
    generation = {"2": 8, "4": 10}.get(version, 9)
    gpu((generation, 0), version)
    assert flash_attn_provider.unsupported(problem()) is None
    assert_right(flash_attn_provider, case)


def test_flash_attn_takes_the_best_version_made_for_the_gpu(gpu):
    gpu((8, 0), "2", "3", "4")
    found = [flash_attn_provider._find_for(each, 64).version.name for each in (8, 9, 10, 12)]
    assert found == [f"flash-attn {number}" for number in (2, 3, 4, 2)]
    wide = flash_attn_provider._find_for(10, 256)
    assert wide.version.name == "flash-attn 2"


def test_flash_attn_says_why_not(gpu, monkeypatch):
    gpu((10, 0))
    assert flash_attn_provider.unsupported(problem()) == "flash-attn is not installed"
    flash_attn_provider._find_for.cache_clear()
    gpu((10, 0), "4")
    assert flash_attn_provider.unsupported(problem(head_dim=192)) == (
        "flash-attn 4 serves heads of up to 128 elements; these have 192"
    )
    flash_attn_provider._find_for.cache_clear()
    monkeypatch.setattr(sys.modules["flash_attn.cute.interface"], "_flash_attn_fwd", lambda q: q)
    assert flash_attn_provider.unsupported(problem()) == (
        "flash-attn 4 is of a release whose functions take other arguments"
    )


def test_flash_attn_that_is_broken_is_named(gpu, tmp_path, monkeypatch):
    """As one that was built for another torch."""
    gpu((8, 0))
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "flash_attn_interface.py").write_text("import flash_attn_2_cuda")
    monkeypatch.syspath_prepend(tmp_path)
    assert flash_attn_provider.unsupported(problem()) == (
        "flash-attn 2 cannot be imported: No module named 'flash_attn_2_cuda'"
    )
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# ---- what they don't serve -----------------------------------------------------------------------

FLASH = [sdpa_provider, varlen_provider, flash_attn_provider]


@pytest.mark.parametrize("provider", [*FLASH[1:], flex_provider])
def test_needs_a_gpu(provider, monkeypatch):
    on_cpu = problem(device="cpu")
    assert provider.unsupported(on_cpu) == "runs on CUDA devices; the tensors are on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert provider.unsupported(problem()) == "this process sees no CUDA device"


@pytest.mark.parametrize("provider", FLASH)
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": F32}, "serves float16 and bfloat16, not float32"),
        ({"value_dim": 32}, "wants values as wide as keys; these have 32 and 64 elements"),
        ({"head_dim": 264}, "serves heads of up to 256 elements, in steps of 8; these have 264"),
        ({"head_dim": 20}, "serves heads of up to 256 elements, in steps of 8; these have 20"),
        ({"sinks": True}, "has no sinks"),
        ({}, None),
    ],
)
def test_says_what_flash_attention_does_not_serve(gpu, provider, facts, reason):
    gpu((8, 0), "2")
    assert provider.unsupported(problem(**facts)) == reason


def test_says_what_each_does_not_serve(gpu, monkeypatch):
    gpu((7, 5))
    assert varlen_provider.unsupported(problem()) == (
        "needs compute capability 8.0; this device has 7.5"
    )
    gpu((8, 0))
    both = problem(softcap=True, window=True)
    assert sdpa_provider.unsupported(both) == "has no window and no softcap"
    assert varlen_provider.unsupported(both) == "has no softcap"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert varlen_provider.unsupported(problem()) == "this build of torch has no FlashAttention"
    monkeypatch.setattr(launcher, "why_not", lambda: "no compiler")
    assert flex_provider.unsupported(problem()) == "no compiler"
    monkeypatch.setattr(launcher, "why_not", lambda: None)
    assert flex_provider.unsupported(problem(dtype=F64)) == "computes in float32, not float64"
    assert flex_provider.unsupported(problem(sinks=True)) == "has no sinks"
    assert flex_provider.unsupported(both._replace(value_dim=128)) is None


def test_flex_is_taken_by_name_only(gpu, as_if_proven, monkeypatch):
    gpu((8, 0))
    monkeypatch.setattr(launcher, "why_not", lambda: None)
    facts = {"device": "cuda", "dtype": F32, "head_dim": 64, "query_heads": 4, "key_heads": 4}
    facts |= {"value_dim": 32, "window": True}
    row = choose("packed_attention", **facts)
    assert row.backend == "eager"
    reasons = {rejection.backend: rejection.reason for rejection in row.rejected}
    assert reasons["flex"] == "recompiles for new lengths: by name only"
    assert choose("packed_attention", requested="flex", **facts).backend == "flex"


def test_sdpa_on_a_cpu_serves_what_torch_computes_in_full():
    on_cpu = problem(device="cpu", dtype=F32)
    assert sdpa_provider.unsupported(on_cpu) is None
    assert sdpa_provider.unsupported(on_cpu._replace(head_dim=19, value_dim=19)) is None
    assert sdpa_provider.unsupported(on_cpu._replace(dtype=BF16)) == (
        "adds up gradients in bfloat16 on CPUs; serves float32 and float64"
    )
    assert sdpa_provider.unsupported(on_cpu._replace(window=True)) == "has no window"
