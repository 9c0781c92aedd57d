"""Backends that fail, each in its own way, found and survived.

The toy op doubles; toy_op/<backend>.py says what is wrong with each.
"""

import os
import subprocess
import sys
import threading

import pytest
import torch
from fasttrain_kernels import KernelFailure, UnsupportedKernel, quarantine, reset, use
from fasttrain_kernels.guard import CHECK_EVERY, FIRST_CHECKS
from fasttrain_kernels.registry import OPS
from fasttrain_kernels.store import store_for
from toy_op import leaky, nan, self_test, third
from toy_op.op import describe, double, make

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="about kernels that are not interpreted"
)

REAL = torch.arange(1.0, 101.0)


@pytest.fixture(autouse=True)
def alone(own_cache, monkeypatch):
    """Backends that have done nothing yet."""
    monkeypatch.setattr(third, "calls", {"forward": 0, "backward": 0})
    monkeypatch.setattr(nan, "calls", 0)
    monkeypatch.setattr(nan, "first", 1)
    leaky.kept.clear()
    self_test.RUNS.clear()
    yield
    leaky.kept.clear()


def rejected(op, **options):
    row = op.choose(describe(rows=100), **options)
    return row.backend, {each.backend: each.reason for each in row.rejected}


def again(*backends, **options):
    """The op as the next process finds it: nothing remembered but what is on the disk."""
    from fasttrain_kernels import store

    store._stores.clear()
    self_test.RUNS.clear()
    return make(*backends, **options)


# --- a self-test that fails ---------------------------------------------------------------------


def test_wrong_gradients_are_found_before_the_first_use_and_remembered():
    op = make("wrong", "good")
    x = REAL.clone().requires_grad_()
    double(x).sum().backward()
    assert x.grad.eq(2).all()
    reason = "its self-test is off by 7e+03 times what is allowed"
    assert rejected(op) == ("good", {"wrong": f"in quarantine: {reason}"})
    op = again("wrong", "good")
    assert rejected(op)[0] == "good" and not self_test.RUNS
    with pytest.raises(UnsupportedKernel, match=r"'wrong'.*in quarantine: its self-test is off"):
        double(REAL, "wrong")
    with pytest.raises(UnsupportedKernel, match="allows no fallback, and 'wrong'"):
        op.choose(describe(), mode="strict")


def test_a_self_test_runs_once_for_a_machine():
    op = make("good")
    assert op.choose(describe()).parity == 0.0
    assert len(self_test.RUNS) == 1
    op = again("good")
    assert op.choose(describe()).parity == 0.0
    assert not self_test.RUNS
    reset("toy", "other")
    assert op.choose(describe()).parity == 0.0 and not self_test.RUNS
    reset("toy")
    assert op.choose(describe()).parity == 0.0 and self_test.RUNS


def test_a_self_test_is_not_disturbed_by_the_process_nor_disturbs_it():
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            row = OPS["rms_norm"].choose(
                OPS["rms_norm"].describe(device="cpu", dtype=torch.float32, width=8)
            )
            assert torch.get_default_dtype() == torch.float64 and torch.is_inference_mode_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert row.parity <= 1 and torch.equal(torch.get_rng_state(), before)


def test_many_threads_may_come_first():
    make("wrong", "good")
    found, start = [], threading.Barrier(8)

    def call():
        start.wait()
        found.append(double(REAL))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(y, 2 * REAL) for y in found)


# --- a call that fails --------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_call_that_raises_is_made_again_on_the_next(phase, caplog):
    make("third", "other")
    third.calls["backward" if phase == "forward" else "forward"] = 100
    for _ in range(5):
        x = REAL.clone().requires_grad_()
        y = double(x)
        y.sum().backward()
        assert torch.equal(y.detach(), 2 * REAL) and x.grad.eq(2).all()
    assert third.calls[phase] == 3
    reason = f"its {phase} pass fails: RuntimeError: third {phase}"
    assert rejected(again("third", "other")) == ("other", {"third": f"in quarantine: {reason}"})
    record = store_for("cpu").get("quarantine", "toy|third")
    assert "Traceback" in record["traceback"] and "third.py" in record["traceback"]
    assert caplog.text.count("is in quarantine from now on") == 1


def test_by_name_nothing_takes_over():
    make("third", "other")
    for _ in range(2):
        double(REAL, "third")
    with pytest.raises(
        KernelFailure, match="toy: backend 'third': its forward pass fails"
    ) as error:
        double(REAL, "third")
    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(UnsupportedKernel, match="in quarantine: its forward pass fails"):
        double(REAL, "third")


def test_preferred_by_a_plan_is_not_by_name():
    make("other", "third")
    for _ in range(4):
        assert torch.equal(double(REAL, "auto:third"), 2 * REAL)
    assert third.calls["forward"] == 3


def test_a_call_that_is_at_fault_itself_blames_nobody(monkeypatch):
    op = make("good", "other")

    def unfit(x):
        raise ValueError("x is unfit")

    modules = [op.candidate(name).load() for name in ("good", "other", "eager")]
    for name in ("auto", "other"):
        double(REAL, name)  # proven
    for module in modules:
        monkeypatch.setattr(module, "forward", unfit)
    with pytest.raises(ValueError, match="x is unfit"):
        double(REAL)
    assert rejected(op) == ("good", {})
    with pytest.raises(ValueError, match="x is unfit"):
        double(REAL, "other")


def test_memory_that_runs_out_blames_nobody(monkeypatch):
    op = make("good", "other")
    double(REAL)

    def hungry(x):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(op.candidate("good").load(), "forward", hungry)
    with pytest.raises(torch.OutOfMemoryError):
        double(REAL)
    assert rejected(op) == ("good", {})


def test_what_was_written_over_is_not_read_again(monkeypatch):
    op = make("third", "other")
    third.calls["forward"] = 2
    with pytest.raises(KernelFailure, match="third forward"):
        op.run("forward", describe(rows=100), "auto", lambda k: k.forward(REAL), repeatable=False)
    assert rejected(op)[0] == "other"


# --- results that are not finite ----------------------------------------------------------------


def test_nan_is_found_in_the_first_calls_and_the_call_made_again():
    nan.first = FIRST_CHECKS
    op = make("nan", "other")
    for _ in range(FIRST_CHECKS):
        assert torch.equal(double(REAL), 2 * REAL)
    backend, reasons = rejected(op)
    assert backend == "other" and reasons["nan"].startswith(
        "in quarantine: its forward pass gives values that are not finite"
    )


def test_later_calls_are_looked_at_now_and_then():
    nan.first = FIRST_CHECKS + 1
    op = make("nan", "other")
    missed = 0
    while rejected(op)[0] == "nan":
        missed += not torch.equal(double(REAL), 2 * REAL)
    assert missed == CHECK_EVERY["cpu"] - FIRST_CHECKS - 1


def test_what_overflows_in_the_reference_too_is_nobodys_fault():
    op = make("good")
    assert double(torch.full((9,), 3e38)).isinf().all()
    assert double(torch.full((9,), float("nan"))).isnan().all()
    assert rejected(op) == ("good", {})


def test_nan_by_name_is_an_error():
    make("nan", "other")
    with pytest.raises(KernelFailure, match="not finite, where the reference's are"):
        double(REAL, "nan")


# --- what ends the process ----------------------------------------------------------------------

START = """
import torch
from toy_op.op import describe, double, make
op = make("killer", "other")
x = torch.arange(1.0, 101.0)
assert torch.equal(double(x), 2 * x)
row = op.choose(describe(rows=100))
print(row.backend, "|", row.rejected[0].reason)
"""


def start(script=START, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("when", ["self-test", "first forward pass"])
def test_what_ends_the_process_is_not_tried_again(when):
    first = start(TOY_KILLS=when)
    assert first.returncode == -9, first.stderr
    second = start(TOY_KILLS=when)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("other | in quarantine: process ")
    assert f"ended during its {when}" in second.stdout
    assert "backend killer is in quarantine from now on" in second.stderr


def test_a_launch_that_goes_on_elsewhere_is_no_crash_and_an_exception_leaves_no_trace():
    op = make("good", "other")
    store = store_for("cpu")
    with store.in_flight("toy", "good", "self-test"):
        assert rejected(again("good", "other"))[0] == "good"
    with pytest.raises(KeyboardInterrupt), store.in_flight("toy", "good", "self-test"):
        raise KeyboardInterrupt
    assert rejected(again("good", "other")) == ("good", {})
    assert op.name == "toy"


def test_an_isolated_backend_may_die_in_its_self_test_without_taking_us_along(monkeypatch):
    monkeypatch.setenv("TOY_KILLS", "self-test")
    op = make("killer", "good", isolated=True)
    backend, reasons = rejected(op)
    assert backend == "good" and op.choose(describe()).parity == 0.0
    assert "a process of its own ended with -9" in reasons["killer"]


# --- settings -----------------------------------------------------------------------------------


def test_deterministic_passes_over_what_varies(monkeypatch):
    op = make("varying", "good")
    assert rejected(op)[0] == "varying"
    for options in ({"deterministic": True}, {}):
        if not options:
            monkeypatch.setenv("FASTTRAIN_KERNELS", "deterministic=true")
        backend, reasons = rejected(op, **options)
        assert backend == "good"
        assert reasons["varying"] == "not deterministic: it adds in whatever order"
    with use(deterministic=False):
        assert rejected(op)[0] == "varying"
    with pytest.raises(UnsupportedKernel, match="not deterministic"):
        op.choose(describe(), "varying")


def test_providers_may_be_left_out(monkeypatch):
    op = make("other", "good", providers=("other",))
    assert rejected(op)[0] == "other"
    assert rejected(op, providers=())[1]["other"] == "left out: not among the providers allowed"
    monkeypatch.setenv("FASTTRAIN_KERNELS", "providers=none")
    assert rejected(op)[0] == "good"
    with use(providers=("other",)):
        assert rejected(op)[0] == "other"
    with pytest.raises(
        ValueError, match=r"providers=none leaves other out, so toy=other contradicts"
    ):
        monkeypatch.setenv("FASTTRAIN_KERNELS", "providers=none,toy=other")
        rejected(op)
    monkeypatch.setenv("FASTTRAIN_KERNELS", "providers=sdpa+nobody")
    with pytest.raises(ValueError, match=r"providers='nobody'; expected one of all, .*sdpa"):
        rejected(op)


def test_whoever_sees_a_fault_can_quarantine():
    op = make("good", "other")
    quarantine("toy", "good", "I saw it")
    assert rejected(op) == ("other", {"good": "in quarantine: I saw it"})
    reset("toy", "good")
    assert rejected(op) == ("good", {})
    with pytest.raises(ValueError, match="toy has no backend 'best'; it has good, other"):
        quarantine("toy", "best", "because")
