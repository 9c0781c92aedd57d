"""Self-tests: what the process computes in doesn't reach them, and what they find is found once."""

import os
import threading
import types

import pytest
import torch
from fasttrain_kernels import check, proof, timing
from fasttrain_kernels.registry import OPS
from fasttrain_kernels.store import store_for
from toy_op import self_test
from toy_op.op import describe, double, make

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="about kernels that are not interpreted"
    ),
    pytest.mark.usefixtures("own_cache"),
]
NEWER = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def precisions():
    """What the process says of float32 products, in both of PyTorch's ways."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "can't be read"
    return older, *(setting.fp32_precision for setting in NEWER)


@pytest.fixture
def as_before():
    """PyTorch's settings, put back."""
    found = precisions()
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision(found[0])
    for setting, precision in zip(NEWER, found[1:], strict=True):
        setting.fp32_precision = precision


STATES = {
    "default device": lambda: torch.set_default_device("meta"),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "older precision": lambda: torch.set_float32_matmul_precision("medium"),
    "newer precision": lambda: setattr(NEWER[0], "fp32_precision", "tf32"),
    "newer precision of CPUs": lambda: setattr(NEWER[1], "fp32_precision", "bf16"),
}


@pytest.mark.parametrize("state", STATES)
def test_whatever_the_process_computes_in_every_op_is_proven_and_it_stays(state, as_before):
    STATES[state]()
    said = precisions(), torch.get_default_dtype(), torch.get_default_device()
    for name in ("rms_norm", "embedding", "linear_cross_entropy"):
        op = OPS[name]
        problem = op.describe(device="cpu", dtype=torch.float32, **op.example)
        parity = proof.in_this_process(op.self_test, op.candidate("cpu").module, problem)
        assert 0 <= parity <= 1, name
    assert said == (precisions(), torch.get_default_dtype(), torch.get_default_device())


def test_a_context_of_another_device_reaches_neither_proof_nor_timing(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    op, problem = make("good"), describe(rows=1000)
    with torch.device("meta"):
        op.choose(problem, autotune="full")
        assert torch.empty(1).is_meta
    row = op.choose(problem, "good")
    assert row.parity == 0.0 and row.milliseconds > 0


@pytest.mark.parametrize("state", STATES)
def test_products_in_a_self_test_are_whole(state, as_before, monkeypatch):
    seen = []
    monkeypatch.setattr(
        self_test, "parity", lambda kernel, device: (seen.append(precisions()), 0)[1]
    )
    STATES[state]()
    with pytest.raises(RuntimeError, match="serves nothing that its self-test holds"):
        proof.in_this_process("toy_op.self_test", "toy_op.good", describe())
    assert set(seen) == {("highest", "ieee", "ieee")}


@pytest.mark.parametrize(("backend", "expected"), [("good", "good"), ("wrong", "other")])
def test_of_threads_that_come_first_together_one_runs_the_self_test(backend, expected, caplog):
    op = make(backend, "other")
    self_test.RUNS.clear()
    found, start = [], threading.Barrier(8)

    def call():
        start.wait()
        found.append(op.choose(describe(rows=100)).backend)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
    assert len(self_test.RUNS) == (1 if backend == "good" else 2)
    assert caplog.text.count("in quarantine from now on") == (backend == "wrong")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        lambda: torch.empty(2**55),
    ],
)
def test_no_memory_for_a_self_test_condemns_nobody(error, monkeypatch):
    def hungry(kernel, device):
        raise error if isinstance(error, Exception) else error()

    op = make("good", "other")
    with monkeypatch.context() as patch:
        patch.setattr(self_test, "parity", hungry)
        assert op.choose(describe()).backend == "eager"
    assert store_for("cpu").quarantined("toy", "good") is None
    assert op.choose(describe()).backend == "good"


def test_what_providers_may_be_off_by_is_said_alike_by_proof_and_check(monkeypatch):
    """Three roundings where ours may make one."""
    monkeypatch.setattr(self_test, "parity", lambda kernel, device: 3.0 * served(kernel))
    op = make("good", "other", providers=("other",))
    row = op.choose(describe(), "other")
    assert row.parity == 3.0
    ours, theirs, _ = check("toy")
    assert (ours.parity, ours.passed) == (3.0, False)
    assert (theirs.parity, theirs.passed) == (row.parity, True)
    assert op.choose(describe()).backend == "other"
    assert store_for("cpu").quarantined("toy", "good").endswith("3 times what is allowed")


def served(kernel):
    return kernel.unsupported(describe()) is None


def test_a_library_that_greets_does_not_spoil_the_answer_of_a_process(monkeypatch):
    answer = types.SimpleNamespace(returncode=0, stdout="Welcome to X 2.0\n0.25\n")
    monkeypatch.setattr(proof.subprocess, "run", lambda *a, **o: answer)
    assert make("good", isolated=True).choose(describe()).parity == 0.25


def test_no_self_test_draws_of_the_processs_random_numbers():
    make("good")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for op in OPS.values():
        native = next((c for c in op.candidates if c.name in ("cpu", "good")), None)
        problem = op.describe(device="cpu", dtype=torch.float32, **op.example)
        if native is not None:
            proof.in_this_process(op.self_test, native.module, problem)
    double(torch.ones(20))
    assert torch.equal(torch.get_rng_state(), before)
