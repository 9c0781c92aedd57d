"""The choice of a backend: what was asked, by whom, what is refused, and how it is said."""

import dataclasses
import os
import subprocess
import sys
import threading
import types
from typing import NamedTuple

import fasttrain_kernels
import pytest
import torch
from fasttrain_kernels import (
    Choice,
    UnsupportedKernel,
    check,
    choose,
    dispatch,
    explain,
    rms_norm,
    use,
)
from fasttrain_kernels.__main__ import main
from fasttrain_kernels.dispatch import Op
from fasttrain_kernels.ops.rms_norm import cpu_kernel, reference
from fasttrain_kernels.registry import OPS, Candidate
from fasttrain_kernels.settings import EAGER, ENVIRONMENT

FACTS = {"device": "cpu", "dtype": torch.float32, "width": 64}
HALF = {**FACTS, "dtype": torch.float16}  # what the CPU kernel doesn't serve

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="about kernels that are not interpreted"
)


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_auto_takes_the_first_that_can_serve_and_says_why():
    row = choose("rms_norm", **FACTS)
    assert (row.backend, row.reason) == ("cpu", "first choice on cpu")
    reasons = {r.backend: r.reason for r in row.rejected}
    assert reasons["triton"] == reasons["liger"] == "made for cuda; the tensors are on cpu"
    assert reasons["compile"].startswith("compiles for seconds")
    row = choose("rms_norm", **HALF)
    assert (row.backend, row.reason) == ("eager", "first that can serve")
    assert [r.backend for r in row.rejected] == ["triton", "cpu", "liger", "compile"]
    assert "not float16" in row.rejected[1].reason


def test_choose_needs_no_tensors_and_knows_devices_that_are_not_here():
    row = choose("rms_norm", device="meta", dtype=torch.bfloat16, width=64)
    assert (row.backend, row.reason) == ("eager", "first choice on meta")
    if not torch.cuda.is_available():
        row = choose("rms_norm", device="cuda", dtype=torch.bfloat16, width=64)
        assert row.backend == "eager"
        assert row.rejected[0].reason == "this process sees no CUDA device"


def test_rows_are_frozen_and_comparable():
    row = choose("rms_norm", **FACTS)
    assert row == choose("rms_norm", **FACTS) and isinstance(row, Choice)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.backend = "eager"
    assert 0 < row.parity <= 1 and row.milliseconds is None


def test_explain_gives_a_row_per_op():
    assert [row.op for row in explain(device="cpu", dtype=torch.float32)] == sorted(OPS)
    assert explain("rms_norm", requested="eager", **FACTS)[0].backend == "eager"


def test_precedence_use_then_environment_then_caller(monkeypatch):
    def chosen(**asked):
        return choose("rms_norm", **FACTS, **asked).backend

    assert chosen(requested="eager") == "eager"
    monkeypatch.setenv(ENVIRONMENT, "rms_norm=cpu")
    assert chosen(requested="eager") == "cpu"
    with use(rms_norm="eager"):
        assert chosen(requested="cpu") == "eager"
        with use(rms_norm="cpu"):
            assert chosen() == "cpu"
        assert chosen() == "eager"
    assert chosen(requested="eager") == "cpu"


def test_mode_eager_is_the_reference_unless_a_higher_level_names_a_backend(monkeypatch):
    assert choose("rms_norm", mode="eager", **FACTS).backend == "eager"
    monkeypatch.setenv(ENVIRONMENT, "mode=eager")
    assert choose("rms_norm", requested="cpu", **FACTS).backend == "eager"
    with use(rms_norm="cpu"):
        assert choose("rms_norm", **FACTS).backend == "cpu"
    with use(mode="auto"):
        assert choose("rms_norm", **FACTS).backend == "cpu"


def test_auto_by_name_takes_back_what_a_lower_level_forced(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "rms_norm=eager")
    with use(rms_norm="auto"):
        assert choose("rms_norm", **FACTS).backend == "cpu"


def test_strict_allows_no_fallback(monkeypatch):
    assert choose("rms_norm", mode="strict", **FACTS).backend == "cpu"
    with pytest.raises(UnsupportedKernel, match=r"'cpu', the first choice on cpu.*not float16"):
        choose("rms_norm", mode="strict", **HALF)
    monkeypatch.setenv(ENVIRONMENT, "mode=strict")
    x = torch.ones(2, 4, dtype=torch.float16)
    with pytest.raises(UnsupportedKernel, match=r"FASTTRAIN_KERNELS \(mode=strict\)"):
        rms_norm(x, x[0])
    assert rms_norm(x, x[0], backend="eager").dtype == torch.float16  # asked for, so no fallback


def test_a_refusal_names_op_backend_who_asked_reason_and_alternatives(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "rms_norm=triton")
    with pytest.raises(UnsupportedKernel) as refusal:
        rms_norm(torch.ones(2, 4), torch.ones(4))
    assert str(refusal.value) == (
        "rms_norm: backend 'triton', asked for by FASTTRAIN_KERNELS, can't serve this call: "
        "runs on CUDA devices; the tensors are on cpu. These can: cpu, compile, eager"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rmsnorm=cpu", "there is no op 'rmsnorm'; the ops are .*rms_norm"),
        ("rms_norm=c++", r"rms_norm='c\+\+'; expected one of auto, triton, cpu, .*eager"),
        ("mode=slow", "mode='slow'; expected one of auto, eager, strict"),
        ("strict", "'strict' is not of the form name=value"),
        ("mode=eager,rms_norm=cpu", "mode=eager runs every op's reference.*drop one"),
        ("rms_norm=cpu,rms_norm=eager", "rms_norm is given twice"),
    ],
)
def test_bad_names_in_the_environment_are_errors(monkeypatch, text, message):
    monkeypatch.setenv(ENVIRONMENT, text)
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(2, 4), torch.ones(4))


class Toy(NamedTuple):
    """A problem without any facts but where it is."""

    device: torch.device
    rows: int = 0


CPU_TOY = Toy(torch.device("cpu"))


@pytest.fixture
def toy(monkeypatch, own_cache):
    """An op of three backends on CPUs: one that can't serve, one that advises against itself, one
    that does neither."""

    def backend(name, **functions):
        module = types.ModuleType(f"toy.{name}")
        vars(module).update({"unsupported": lambda problem: None, **functions})
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return Candidate(name, module.__name__, ("cpu",))

    backend("reference")
    backend(
        "self_test", parity=lambda kernel, device: 0.5 if kernel.unsupported(CPU_TOY) is None else 9
    )
    candidates = (
        backend("unable", unsupported=lambda problem: "too small"),
        backend("slow", advice=lambda problem: "slow, by name only"),
        backend("fair", advice=lambda problem: None),
    )
    return Op("toy", candidates, "toy", lambda device: Toy(device), {})


def test_a_backend_that_advises_against_itself_is_taken_by_name_only(toy):
    problem = CPU_TOY
    row = toy.choose(problem)
    assert (row.backend, row.reason) == ("fair", "first that can serve")
    assert [(r.backend, r.reason) for r in row.rejected] == [
        ("unable", "too small"),
        ("slow", "slow, by name only"),
    ]
    assert toy.choose(problem, "slow").backend == "slow"
    toy.candidates = toy.candidates[1:]
    assert toy.choose(problem).reason == "first choice on cpu"


def test_strict_passes_over_advice_but_not_over_what_cannot_serve(toy):
    problem = CPU_TOY
    with pytest.raises(UnsupportedKernel, match=r"'unable', the first choice.*'fair' could"):
        toy.choose(problem, mode="strict")
    toy.candidates = toy.candidates[1:]
    assert toy.choose(problem, mode="strict").backend == "fair"
    toy.candidates = (toy.candidates[0], toy.candidates[2])
    assert toy.choose(problem, mode="strict").backend == EAGER  # nothing is better


def test_a_refusal_lists_what_could_serve_though_it_advises_against_itself(toy):
    with pytest.raises(UnsupportedKernel, match=r"too small\. These can: slow, fair"):
        toy.choose(CPU_TOY, "unable")


def test_reasons_and_errors_name_who_asked(monkeypatch):
    def ask(**asked):
        return choose("rms_norm", **FACTS, source="the config", **asked)

    assert ask(requested="cpu").reason == "asked for by the config"
    assert ask(mode="eager").reason == "asked for by the config (mode=eager)"
    with pytest.raises(UnsupportedKernel, match="'triton', asked for by the config, can't"):
        ask(requested="triton")
    monkeypatch.setenv(ENVIRONMENT, "rms_norm=cpu")
    assert ask(requested="eager").reason == "asked for by FASTTRAIN_KERNELS"
    # "auto" by name says nothing about fallbacks: the mode does.
    monkeypatch.setenv(ENVIRONMENT, "mode=strict")
    with use(rms_norm="auto"), pytest.raises(UnsupportedKernel) as refusal:
        choose("rms_norm", **HALF)
    assert "FASTTRAIN_KERNELS (mode=strict) allows no fallback" in str(refusal.value)


def test_bad_names_in_use_are_errors_at_once():
    for asked, message in (
        ({"rmsnorm": "cpu"}, "there is no op 'rmsnorm'; the ops are"),
        ({"rms_norm": "gpu"}, r"use\(\): rms_norm='gpu'; expected one of"),
        ({"mode": "fast"}, r"use\(\): mode='fast'; expected one of"),
    ):
        with pytest.raises(ValueError, match=message), use(**asked):
            raise AssertionError("the block must not be entered")
    with pytest.raises(ValueError, match="there is no op 'norm'"):
        choose("norm", **FACTS)


def test_use_is_undone_by_an_exception_and_seen_by_other_threads():
    with pytest.raises(KeyError), use(rms_norm="eager"):
        raise KeyError
    seen = []
    with use(rms_norm="eager"):  # autograd's device threads must see it
        thread = threading.Thread(target=lambda: seen.append(choose("rms_norm", **FACTS).backend))
        thread.start()
        thread.join()
    assert seen == ["eager"] and choose("rms_norm", **FACTS).backend == "cpu"


def test_use_reaches_the_backward_pass(monkeypatch):
    calls = []
    monkeypatch.setattr(
        reference, "backward", lambda *a, real=reference.backward: (calls.append(1), real(*a))[1]
    )
    x = torch.ones(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4))
    with use(rms_norm="eager"):
        y.sum().backward()
    assert calls == [1]


def test_selection_is_a_look_up(monkeypatch):
    op = OPS["rms_norm"]
    problem = op.describe(**FACTS)
    chosen = op.select(problem, "auto")
    assert chosen.module is cpu_kernel
    monkeypatch.setattr(dispatch, "decide", lambda *_: pytest.fail("decided again"))
    assert op.select(problem, "auto") is chosen


def test_a_backend_that_cannot_be_imported_is_a_reason(monkeypatch):
    op = OPS["rms_norm"]
    absent = Candidate("absent", "fasttrain_kernels.no_such_module", ("cpu",))
    monkeypatch.setattr(op, "candidates", (absent, *op.candidates))
    row = choose("rms_norm", **FACTS)
    assert row.backend == "cpu"
    assert row.rejected[0].reason.startswith("cannot be imported: No module named")


def test_check_compares_every_backend_with_exact_values(monkeypatch):
    assert [(row.backend, row.passed) for row in check("rms_norm")] == [
        ("cpu", True),
        ("compile", False),  # not run: it compiles for long
        ("eager", True),
    ]

    def wrong(*arguments, real=reference.backward):
        dx, dweight = real(*arguments)
        return dx * 1.01, dweight

    monkeypatch.setattr(reference, "backward", wrong)
    rows = {(row.op, row.backend): row for row in check()}
    assert {op for op, _ in rows} == set(OPS)
    failed = [key for key, row in rows.items() if row.parity is not None and not row.passed]
    assert failed == [("rms_norm", "eager")]


def test_the_command_prints_the_table():
    good = subprocess.run(
        [sys.executable, "-m", "fasttrain_kernels", "--check", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert good.returncode == 0, good.stderr
    assert "rms_norm" in good.stdout and "made for cuda; the tensors are on cpu" in good.stdout
    assert "self-test on cpu" in good.stdout and "FAILED" not in good.stdout


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("rms_norm=triton", "error: rms_norm: backend 'triton'"),
        ("rmsnorm=cpu", "error: there is no op 'rmsnorm'"),
    ],
)
def test_the_command_ends_with_2_where_what_was_asked_cannot_serve(
    asked, message, monkeypatch, capsys
):
    monkeypatch.setenv(ENVIRONMENT, asked)
    monkeypatch.setattr(sys, "argv", ["fasttrain_kernels", "--device", "cpu"])
    assert main() == 2
    assert capsys.readouterr().err.startswith(message)


def test_everything_exported_exists():
    assert all(hasattr(fasttrain_kernels, name) for name in fasttrain_kernels.__all__)
