"""What choosing costs: a selection that is remembered, a whole call against the kernel's own, and
the start of a process, with what earlier ones have found and without.

Times are of this process's Python, whatever the device: the tensors are tiny.
"""

import pytest
import torch
from fasttrain_kernels import rms_norm, store, swiglu
from fasttrain_kernels.fingerprint import fingerprint, source_digest
from fasttrain_kernels.registry import OPS
from fasttrain_kernels.settings import AUTO

from bench.harness import Case, Provider


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path))


def ready(call):
    """A provider's build: the call, made once before."""
    call()
    return lambda: call


def test_select(compare, device):
    op = OPS["rms_norm"]
    problem = op.describe(device=device, dtype=torch.float32, width=64, rows=16)
    nothing = lambda kernel: None  # noqa: E731
    compare(
        Case("dispatch", "a remembered choice", 0),
        [
            Provider("select", ready(lambda: op.select(problem, AUTO))),
            Provider("run", ready(lambda: op.run("forward", problem, AUTO, nothing))),
            Provider(
                "describe", ready(lambda: op.describe(device=device, dtype=torch.float32, width=64))
            ),
        ],
        ours="select",
        baseline="run",
    )


def calls(name, device):
    """The whole op, its part below autograd, and what the kernel's own function takes."""
    x = torch.randn(16, 64, device=device)
    weight = torch.ones(64, device=device)
    if name == "rms_norm":
        kernel = OPS[name].select(OPS[name].describe(device=device, dtype=x.dtype, width=64), AUTO)
        return (
            lambda: rms_norm(x, weight),
            lambda: torch.ops.fasttrain.rms_norm_forward(x, weight, 1e-6, None, "llama", AUTO),
            lambda: kernel.module.forward(x, weight, 1e-6, None, "llama"),
        )
    kernel = OPS[name].select(OPS[name].describe(device=device, dtype=x.dtype, width=64), AUTO)
    return (
        lambda: swiglu(x, x),
        lambda: torch.ops.fasttrain.glu_forward(x, x, "swiglu", "silu", AUTO),
        lambda: kernel.module.forward(x, x, "silu", torch.empty_like(x)),
    )


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_call(compare, device, name):
    whole, opaque, direct = calls(name, device)
    compare(
        Case("dispatch", f"{name} of 16 x 64, forward", 0),
        [
            Provider("call", ready(whole)),
            Provider("torch.ops", ready(opaque)),
            Provider("direct", ready(direct)),
        ],
        ours="call",
        baseline="direct",
    )


def choose_all(device):
    """Every op on a typical problem, as a process does that has just begun."""
    store._stores.clear()
    fingerprint.cache_clear()
    source_digest.cache_clear()
    for op in OPS.values():
        op.forget()
        op.choose(op.describe(device=device, dtype=torch.float32, **op.example))


def test_start(compare, device):
    def cold():
        store.reset()
        choose_all(device)

    compare(
        Case("dispatch", "choosing for every op", 0),
        [
            Provider("warm", lambda: lambda: choose_all(device)),
            Provider("cold", lambda: cold),
        ],
        ours="warm",
        baseline="cold",
    )
