"""Calls of a backend that was chosen: which results are looked at, and who is to blame."""

import os

import pytest
import torch
from fasttrain_kernels import KernelFailure, UnsupportedKernel, use
from fasttrain_kernels.guard import CHECK_EVERY, FIRST_CHECKS
from fasttrain_kernels.store import store_for
from toy_op import nan, third
from toy_op.op import describe, double, make

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="about kernels that are not interpreted"
    ),
    pytest.mark.usefixtures("own_cache"),
]
REAL = torch.arange(1.0, 101.0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(third, "calls", {"forward": 0, "backward": 0})
    monkeypatch.setattr(nan, "calls", 0)
    monkeypatch.setattr(nan, "first", 1)


@pytest.mark.parametrize("layers", [1, 2, 32])
def test_every_layers_passes_are_looked_at_in_turn(layers):
    """One choice serves all layers of a model: forward of each, then backward of each."""
    chosen = make("good").select(describe(rows=100), "auto")
    seen = set()
    for _ in range(FIRST_CHECKS + CHECK_EVERY["cpu"]):
        for phase in ("forward", "backward"):
            seen |= {(phase, n) for n in range(layers) if chosen.is_to_be_checked(phase)}
    assert seen == {(phase, n) for phase in ("forward", "backward") for n in range(layers)}


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_first_calls_of_each_pass_are_looked_at(phase):
    chosen = make("good").select(describe(rows=100), "auto")
    other = {"forward": "backward", "backward": "forward"}[phase]
    for _ in range(FIRST_CHECKS):
        assert chosen.is_to_be_checked(other)
    assert all(chosen.is_to_be_checked(phase) for _ in range(FIRST_CHECKS))
    assert not chosen.is_to_be_checked(phase)


def test_nan_that_begins_later_is_found_in_training(monkeypatch):
    """Forward and backward by turns: neither hides behind the other."""
    nan.first = 20
    make("nan", "other")
    for _ in range(CHECK_EVERY["cpu"] + 1):
        x = REAL.clone().requires_grad_()
        double(x).sum().backward()
    assert store_for("cpu").quarantined("toy", "nan").startswith("its forward pass gives values")


# --- where nothing else may serve ---------------------------------------------------------------


def test_strict_takes_no_other_for_one_that_fails_and_remembers_it():
    make("third", "other")
    with use(mode="strict"):
        for _ in range(2):
            double(REAL)
        with pytest.raises(KernelFailure, match="backend 'third': its forward pass fails"):
            double(REAL)
        assert "third forward" in store_for("cpu").quarantined("toy", "third")
        with pytest.raises(UnsupportedKernel, match="allows no fallback, and 'third'"):
            double(REAL)
    assert torch.equal(double(REAL), 2 * REAL)


def test_strict_takes_no_other_result_for_nan():
    make("nan", "other")
    with use(mode="strict"), pytest.raises(KernelFailure, match="not finite"):
        double(REAL)
    assert store_for("cpu").quarantined("toy", "nan") is not None


def test_strict_blames_nobody_for_a_call_that_is_at_fault_itself(monkeypatch):
    op = make("good", "other")
    double(REAL)

    def unfit(x):
        raise ValueError("x is unfit")

    for name in ("good", "eager"):
        monkeypatch.setattr(op.candidate(name).load(), "forward", unfit)
    with use(mode="strict"), pytest.raises(ValueError, match="x is unfit"):
        double(REAL)
    assert store_for("cpu").quarantined("toy", "good") is None


# --- memory -------------------------------------------------------------------------------------


def too_much(x):
    return torch.empty(2**55)  # a RuntimeError on a CPU


def test_memory_of_a_cpu_that_runs_out_blames_nobody(monkeypatch):
    op = make("good", "other")
    double(REAL)
    monkeypatch.setattr(op.candidate("good").load(), "forward", too_much)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        double(REAL)
    assert store_for("cpu").quarantined("toy", "good") is None


def test_a_reference_that_finds_no_memory_says_nothing_of_the_result(monkeypatch):
    op = make("nan", "other")
    double(torch.ones(2))
    monkeypatch.setattr(op.candidate("eager").load(), "forward", too_much)
    monkeypatch.setattr(op.candidate("nan").load(), "forward", lambda x: x * float("nan"))
    assert double(REAL).isnan().all()
    assert store_for("cpu").quarantined("toy", "nan") is None
