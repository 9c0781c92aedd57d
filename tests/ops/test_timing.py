"""The timing pass: who is taken, who is rejected and why, and that it is made once."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from fasttrain_kernels import choose, native, selection, timing, use
from fasttrain_kernels.registry import OPS
from fasttrain_kernels.store import store_for
from fasttrain_kernels.timing import Sizes
from toy_op import leaky, slow, workload
from toy_op.op import describe, double, make

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="about kernels that are not interpreted"
)
FULL = {"autotune": "full"}
PROBLEM = describe(rows=1000)
MB = 2**20


@pytest.fixture(autouse=True)
def alone(own_cache, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    leaky.kept.clear()
    yield
    leaky.kept.clear()


def reasons(row):
    return {each.backend: each.reason for each in row.rejected}


def test_what_is_right_but_slow_is_not_chosen(monkeypatch):
    monkeypatch.setattr(selection, "NEARLY", 1.0)  # the order of equals decides nothing here
    op = make("slow", "good")
    assert op.choose(PROBLEM).backend == "slow"
    row = op.choose(PROBLEM, **FULL)
    assert row.backend in ("good", "eager") and row.reason == "fastest of 3 that were timed"
    assert reasons(row)["slow"].startswith("slower: ") and reasons(row)["slow"].endswith(" ms")
    assert 0 < row.milliseconds <= row.eager_milliseconds
    # On record: for this size, for whoever asks; not for another, nor where nobody wants times.
    assert op.choose(PROBLEM) == row
    assert torch.equal(double(torch.ones(1000)), torch.full((1000,), 2.0))
    assert op.select(PROBLEM, "auto").candidate.name == row.backend
    assert op.choose(describe(rows=100)).backend == "slow"
    assert op.choose(PROBLEM, autotune="off").backend == "slow"
    assert op.choose(describe(), **FULL).backend == "slow"  # of unknown size


def test_in_a_call_where_that_is_asked_for():
    op = make("slow", "good")
    with use(autotune="full"):
        double(torch.ones(1000))
        assert op.select(PROBLEM, "auto").candidate.name != "slow"
        assert op.select(PROBLEM, "slow").candidate.name == "slow"


def test_order_decides_between_those_that_are_nearly_as_fast():
    op = make("good", "other")
    names = ("good", "other", "eager", "plain")
    for good, expected in ((1.015, "good"), (1.03, "other")):
        times = dict(zip(names, (good, 1.0, 2.0, 0.5), strict=True))
        record(op, {name: {"ms": ms, "bytes": 0} for name, ms in times.items()})
        row = op.choose(PROBLEM)
        assert (row.backend, row.milliseconds) == (expected, times[expected])
        assert row.eager_milliseconds == 2.0
    # In a model "eager" is its own code.
    row = op.choose(PROBLEM, in_model=True)
    assert (row.backend, row.milliseconds) == ("eager", 0.5)
    assert reasons(row) == {"good": "slower: 1.03 ms", "other": "slower: 1 ms"}


def test_what_a_plan_has_taken_by_its_time_is_taken_in_calls_of_other_sizes():
    op = make("good", "reluctant")
    assert "reluctant" in reasons(op.choose(PROBLEM))
    assert op.choose(PROBLEM, "auto:reluctant").backend == "reluctant"
    record(op, {"good": {"ms": 1.0}, "reluctant": {"ms": 0.5}, "gone": {"ms": 0.1}})
    row = op.choose(PROBLEM)
    assert (row.backend, row.reason) == ("reluctant", "fastest of 2 that were timed")


def record(op, backends):
    op.forget()
    store_for("cpu").put("times", timing._key(op, PROBLEM), {"backends": backends})


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("leaky", "has not given back"), ("hog", "at its peak; the budget is 105 MB")],
)
def test_memory_beyond_the_budget_is_rejected(backend, reason, monkeypatch):
    monkeypatch.setattr(timing, "TOO_SLOW", 1e9)  # or it would not be called often enough
    op = make(backend, "good")
    timing.measure(op, PROBLEM, op.candidates, budget=100 * MB)
    row = op.choose(PROBLEM)
    assert row.backend in ("good", "eager")
    assert reason in reasons(row)[backend]
    assert len(leaky.kept) < 12  # it was called no more
    # Who is rejected for its memory is not taken by its place in the order either.
    assert backend in reasons(op.choose(PROBLEM, in_model=True))


def test_what_fails_while_it_is_timed_is_rejected(monkeypatch):
    op = make("good", "other")
    op.choose(PROBLEM)

    def failing(x):
        raise RuntimeError("no")

    monkeypatch.setattr(op.candidate("good").load(), "forward", failing)
    row = op.choose(PROBLEM, **FULL)
    assert row.backend != "good"
    assert "its forward pass fails: RuntimeError: no" in reasons(row)["good"]


def test_what_is_asked_outside_does_not_reach_into_it(monkeypatch):
    op = make("slow", "good")
    monkeypatch.setenv("FASTTRAIN_KERNELS", "toy=auto,mode=auto")
    with use(toy="auto"):
        op.choose(PROBLEM, **FULL)
    found = timing._records(op, PROBLEM)
    assert found["slow"]["ms"] > 5 > found["good"]["ms"]


def test_a_record_is_for_one_number_of_threads(monkeypatch):
    op = make("good")
    op.choose(PROBLEM, **FULL)
    assert timing.milliseconds(op, PROBLEM)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert not timing.milliseconds(op, PROBLEM)
    assert timing.rejections(op, PROBLEM) == {}


def test_it_leaves_the_random_state_and_the_modes_alone():
    op = make("good")
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        op.choose(PROBLEM, **FULL)
    assert torch.equal(torch.get_rng_state(), before)
    assert timing.milliseconds(op, PROBLEM)


TUNES = """
import torch
from toy_op import workload
from toy_op.op import describe, make
real, made = workload.workload, []
workload.workload = lambda *a, **o: (made.append(1), real(*a, **o))[1]
op = make("slow", "good")
print(op.choose(describe(rows=1000), autotune="full").milliseconds, len(made))
"""


def test_two_processes_that_tune_at_once_measure_once():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TUNES]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    lines = [process.communicate()[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert lines[0][0] == lines[1][0]
    assert sorted(made for _, made in lines) == ["0", "1"]
    assert len(json.loads(store_for("cpu").path.read_text())["times"]) == 1


def test_disturbed_calls_make_nobody_too_slow(monkeypatch):
    """Who is thought too slow is called no more: that must not hang on a single call."""
    op = make("good", "other")
    trials, first_calls, taken = {}, timing._first_calls, []

    def sample(step, device, calls=1):
        """Disturbed are the two calls under PeakMemory, and one of those after."""
        step()
        (name,) = (name for name, trial in trials.items() if trial.step is step)
        taken.append(name)
        return 0.02 + (name == "good" and taken.count(name) <= 3) * 0.5

    keep = lambda found, *rest: (trials.update(found), first_calls(found, *rest))  # noqa: E731
    monkeypatch.setattr(timing, "_first_calls", keep)
    monkeypatch.setattr(timing, "sample", sample)
    op.choose(PROBLEM, **FULL)
    assert len(trials["good"].samples) == len(trials["other"].samples) > 1
    assert timing._records(op, PROBLEM)["good"]["ms"] == 20


def test_who_is_short_is_called_again_however_slow_it_seemed(monkeypatch):
    op = make("slow", "good")
    monkeypatch.setattr(slow.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(timing, "TOO_SLOW", 0.0)
    trials, rounds = {}, timing._rounds
    keep = lambda found, *rest: (trials.update(found), rounds(found, *rest))  # noqa: E731
    monkeypatch.setattr(timing, "_rounds", keep)
    op.choose(PROBLEM, **FULL)
    assert all(len(trial.samples) > 1 for trial in trials.values())


def test_where_the_problem_has_no_room_nothing_is_timed_and_the_run_goes_on(monkeypatch, caplog):
    def hungry(problem, **sizes):
        return torch.empty(2**55)

    monkeypatch.setattr(workload, "workload", hungry)
    row = make("good").choose(PROBLEM, **FULL)
    assert (row.backend, row.milliseconds) == ("good", None)
    assert "toy is not timed: no memory for (dtype=float32, rows=1024)" in caplog.text


def test_a_backend_that_the_pass_ends_the_process_with_is_named(monkeypatch):
    """It has run before, on fewer rows: only the size is new."""
    op, written = make("good", "other"), {}
    double(torch.ones(100))
    flights = store_for("cpu")._flights

    def look(self):
        found = [json.loads(path.read_text()) for path in flights.glob("*.json")]
        written.setdefault(len(written), [(each["backend"], each["what"]) for each in found])

    monkeypatch.setattr(timing.memory.PeakMemory, "__enter__", lambda self: (look(self), self)[1])
    monkeypatch.setattr(timing.memory.PeakMemory, "__exit__", lambda self, *raised: None)
    op.choose(PROBLEM, **FULL)
    what = "timing pass (dtype=float32, rows=1024)"
    for backend in ("good", "other"):
        assert [(backend, what)] in written.values()
    assert [] in written.values()  # eager PyTorch can't be avoided
    assert list(flights.glob("*.json")) == []


# --- the real ops -------------------------------------------------------------------------------


SMALL = {
    "rms_norm": {"width": 64},
    "rope": {"head_dim": 16, "query_heads": 4, "key_heads": 2},
    "swiglu": {"width": 64},
    "geglu": {"width": 64, "activation": "gelu"},
    "embedding": {"width": 16, "vocabulary": 50},
    "cross_entropy": {"classes": 50},
    "linear_cross_entropy": {"classes": 50, "width": 16},
    "linear_log_probs": {"classes": 50, "width": 16},
    "packed_attention": {"head_dim": 16, "query_heads": 4, "key_heads": 2, "document_length": 16},
    "newton_schulz": {"short": 12, "long": 30},
}
FORMS = [
    *SMALL.items(),
    ("rms_norm", {"width": 64, "style": "gemma", "residual_dtype": torch.float32}),
    ("rope", {"head_dim": 15, "style": "interleaved", "query_heads": 2, "key_heads": 2}),
    ("packed_attention", SMALL["packed_attention"] | {"window": True}),
    ("packed_attention", SMALL["packed_attention"] | {"softcap": True, "sinks": True}),
    ("packed_attention", SMALL["packed_attention"] | {"causal": False, "window": True}),
]


@pytest.mark.skipif(native.why_not("_C_cpu") is not None, reason="no C++ kernels here")
@pytest.mark.parametrize(("op", "facts"), FORMS)
def test_every_op_has_a_workload_that_computes_one_thing(op, facts):
    """Backends and a model's own code agree on it; and all of them can be timed."""
    problem = OPS[op].describe(device="cpu", dtype=torch.float32, rows=40, **facts)
    module = importlib.import_module(OPS[op].workload)
    lengths = (30, 10) if op == "packed_attention" else ()
    made = module.workload(problem, rows=40, lengths=lengths)
    results = [made.plain(), *(made.call(name) for name in ("cpu", "eager"))]
    first, *others = [r if isinstance(r, tuple) else (r,) for r in results]
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    row = choose(
        op,
        device="cpu",
        dtype=torch.float32,
        rows=40,
        lengths=lengths,
        providers=(),
        **FULL,
        **facts,
    )
    assert row.milliseconds and row.eager_milliseconds
    assert OPS[op].choose(problem).backend == row.backend


def test_the_lengths_of_the_run_are_what_is_timed(monkeypatch):
    from fasttrain_kernels.ops.packed_attention import workload

    seen = []
    real = workload.DocumentLayout
    noting = lambda lengths: (seen.append(lengths), real(lengths))[1]  # noqa: E731
    monkeypatch.setattr(workload, "DocumentLayout", noting)
    problem = OPS["packed_attention"].describe(
        device="cpu", dtype=torch.float32, rows=40, **SMALL["packed_attention"]
    )
    workload.workload(problem, rows=40, lengths=(7, 33))
    workload.workload(problem, rows=40)
    workload.workload(problem)
    assert seen == [(7, 33), (16, 16, 8), (16, 16, 16, 16)]
    assert Sizes() == (0, ())
