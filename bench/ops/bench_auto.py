"""Whether "auto" takes the fastest for a site of a model: each op on shapes of its own benchmark
and of the quick start, forward and backward, on every backend that can serve; "eager" is what
models do by themselves. `ours` of a row is what "auto" takes after a timing pass.

`python bench/auto.py` says what the results come to. `--compile` has torch.compile's code compete
too, which takes seconds a case to make. On a CPU set MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ to 8589934592, so that the C library keeps what is freed: page faults, up to
half of a short call, otherwise fall on whoever comes after a certain other.
"""

import importlib

import pytest
import torch
from fasttrain_kernels.registry import find
from fasttrain_kernels.selection import why_not
from fasttrain_kernels.settings import EAGER

from bench.harness import Absent, Case, Provider, chosen_device

F32, BF16 = torch.float32, torch.bfloat16
LONGEST = 1.0  # seconds; a backend that takes longer is called once
FEWEST_ROUNDS = 15


def attention(document, dtype=F32):
    heads = {"head_dim": 64, "query_heads": 8, "key_heads": 8}
    return {**heads, "document_length": document, "rows": 4096, "dtype": dtype}


QUICK_START = [  # configs/quickstart.yaml: 4 packs of 512 tokens
    ("rms_norm", {"rows": 2048, "width": 192, "dtype": F32}),
    ("rope", {"rows": 2048, "query_heads": 6, "key_heads": 2, "head_dim": 32, "dtype": F32}),
    ("swiglu", {"rows": 2048, "width": 512, "dtype": F32}),
    ("embedding", {"rows": 2048, "width": 192, "vocabulary": 4096, "dtype": F32}),
    (
        "packed_attention",
        attention(64) | {"rows": 2048, "query_heads": 6, "key_heads": 2, "head_dim": 32},
    ),
]
CPU_CASES = [
    *(("rms_norm", {"rows": r, "width": w, "dtype": F32}) for r, w in ((4096, 512), (8192, 1024))),
    ("rms_norm", {"rows": 32768, "width": 128, "dtype": F32}),
    ("rms_norm", {"rows": 8192, "width": 1024, "dtype": BF16}),
    ("rms_norm", {"rows": 4096, "width": 512, "dtype": F32, "residual_dtype": F32}),
    *(
        ("rope", {"rows": r, "query_heads": q, "key_heads": k, "head_dim": d, "dtype": t})
        for r, q, k, d, t in (
            (4096, 8, 8, 64, F32),
            (4096, 16, 2, 128, F32),
            (128, 8, 8, 64, F32),
            (4096, 8, 8, 64, BF16),
        )
    ),
    *(
        (op, {"rows": r, "width": w, "dtype": t} | more)
        for op, more in (("swiglu", {}), ("geglu", {"activation": "gelu_tanh"}))
        for r, w, t in ((4096, 1376, F32), (2048, 8192, F32), (4096, 1376, BF16))
    ),
    *(
        ("embedding", {"rows": 4096, "width": 512, "vocabulary": 32000, "dtype": t})
        for t in (F32, BF16)
    ),
    ("cross_entropy", {"rows": 2048, "classes": 32000, "dtype": F32}),
    ("cross_entropy", {"rows": 512, "classes": 32000, "dtype": BF16}),
    ("linear_cross_entropy", {"rows": 2048, "width": 512, "classes": 32000, "dtype": F32}),
    ("linear_cross_entropy", {"rows": 512, "width": 192, "classes": 4096, "dtype": F32}),
    *(("packed_attention", attention(length)) for length in (64, 512, 4096)),
    ("packed_attention", attention(512, BF16)),
    *QUICK_START,
]
CUDA_CASES = [
    ("rms_norm", {"rows": 16384, "width": 4096, "dtype": BF16}),
    ("rope", {"rows": 16384, "query_heads": 32, "key_heads": 8, "head_dim": 128, "dtype": BF16}),
    ("swiglu", {"rows": 16384, "width": 14336, "dtype": BF16}),
    ("geglu", {"rows": 16384, "width": 14336, "dtype": BF16, "activation": "gelu_tanh"}),
    ("embedding", {"rows": 16384, "width": 4096, "vocabulary": 128256, "dtype": BF16}),
    ("cross_entropy", {"rows": 8192, "classes": 128256, "dtype": BF16}),
    ("linear_cross_entropy", {"rows": 8192, "width": 4096, "classes": 128256, "dtype": BF16}),
    *(
        (
            "packed_attention",
            attention(length, BF16)
            | {"rows": 16384, "head_dim": 128, "query_heads": 32, "key_heads": 8},
        )
        for length in (128, 2048, 16384)
    ),
]


def name_of(op, facts):
    shown = (str(value).removeprefix("torch.") for value in facts.values())
    return f"{op} {' '.join(shown)}"


def pytest_generate_tests(metafunc):
    cases = CUDA_CASES if chosen_device(metafunc.config) == "cuda" else CPU_CASES
    metafunc.parametrize(("op", "facts"), cases, ids=[name_of(*case) for case in cases])


def test_auto(compare, device, request, op, facts):
    found = find(op)
    problem = found.describe(device=device, **facts)
    workload = importlib.import_module(found.workload).workload(problem)
    with_compile = request.config.getoption("--compile")

    def provider(backend):
        def build():
            reason = why_not(found, found.candidate(backend), problem)
            if reason is not None:
                raise Absent(reason)
            return lambda: workload.step(None if backend == EAGER else backend)

        return Provider(backend, build, longest=LONGEST, settles=True)

    names = [
        candidate.name
        for candidate in found.candidates
        if candidate.made_for(torch.device(device).type)
        and (candidate.name != "compile" or with_compile)
    ]
    others = tuple(name for name in names if found.candidate(name).provider)
    chosen = found.choose(problem, in_model=True, autotune="full", providers=others).backend
    tensors = (*workload.leaves, *workload.gradients)
    moved = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    compare(
        Case("auto", name_of(op, facts), moved, rounds=FEWEST_ROUNDS),
        [provider(name) for name in names],
        ours=chosen,
        baseline=EAGER,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Times of this run, not of one before."""
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
