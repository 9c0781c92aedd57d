"""What rows of the table say is true: of times, of who is preferred, of blocks that end."""

import os
import threading

import pytest
import torch
from fasttrain_kernels import settings, timing, use
from fasttrain_kernels.settings import Settings
from fasttrain_kernels.store import store_for
from toy_op.op import describe, make

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="about kernels that are not interpreted"
    ),
    pytest.mark.usefixtures("own_cache"),
]
PROBLEM = describe(rows=1000)


def timed(op, **milliseconds):
    op.forget()
    records = {name: {"ms": ms, "bytes": 0} for name, ms in milliseconds.items()}
    store_for("cpu").put("times", timing._key(op, PROBLEM), {"backends": records})


def reasons(row):
    return {each.backend: each.reason for each in row.rejected}


# --- times --------------------------------------------------------------------------------------


def test_a_time_of_who_may_not_serve_counts_for_nothing():
    op = make("good", "other", "third", providers=("good",))
    timed(op, good=1.0, other=2.02, third=2.0, eager=9.0, plain=9.0)
    row = op.choose(PROBLEM, providers=())
    assert (row.backend, row.reason) == ("other", "fastest of 3 that were timed")
    assert reasons(row)["good"] == "left out: not among the providers allowed"


def test_who_is_passed_over_though_it_is_faster_is_not_called_slower():
    op = make("good", "other")
    timed(op, good=1.01, other=1.0, eager=3.0, plain=3.0)
    row = op.choose(PROBLEM)
    assert row.backend == "good"
    assert reasons(row) == {
        "other": "faster by less than 2%, and later in order: 1 ms",
        "eager": "slower: 3 ms",
    }
    row = op.choose(PROBLEM, "auto:eager")
    assert (row.backend, row.reason) == ("eager", "preferred by name")
    assert reasons(row) == {"good": "not preferred: 1.01 ms", "other": "not preferred: 1 ms"}


def test_without_times_where_nobody_wants_them():
    op = make("good", "other")
    timed(op, good=2.0, other=1.0, eager=3.0, plain=3.0)
    row = op.choose(PROBLEM, autotune="off")
    assert (row.backend, row.reason, row.milliseconds) == ("good", "first choice on cpu", None)
    assert reasons(row) == {}


# --- preferred ----------------------------------------------------------------------------------


def test_who_is_preferred_need_not_advise_itself(monkeypatch):
    """A plan has timed it on its own sizes; calls of others have no times."""
    op = make("good", "other")
    advises = lambda problem: "compiles for seconds"  # noqa: E731
    monkeypatch.setattr(op.candidate("other").load(), "advice", advises, raising=False)
    assert op.choose(PROBLEM).backend == "good"
    row = op.choose(PROBLEM, "auto:other")
    assert (row.backend, row.reason, reasons(row)) == ("other", "preferred by name", {})


def test_who_is_preferred_and_cannot_serve_is_passed_over():
    op = make("wrong", "good", "other")
    row = op.choose(PROBLEM, "auto:wrong")
    assert row.backend == "good" and "its self-test is off" in reasons(row)["wrong"]
    with pytest.raises(ValueError, match="toy='best'; expected one of auto, wrong"):
        use(toy="auto:best").__enter__()


# --- levels -------------------------------------------------------------------------------------


def test_each_setting_is_taken_from_the_first_level_that_says_it(monkeypatch):
    make("good", "other", providers=("other",))
    caller = Settings("c", "strict", (("toy", "eager"),), None, "off", True, ())
    asked = settings.wish("toy", caller)
    assert asked == ("eager", "strict", "c", "off", True, ())
    monkeypatch.setenv(
        "FASTTRAIN_KERNELS", "autotune=full,deterministic=false,providers=other,toy=good"
    )
    asked = settings.wish("toy", caller)
    assert asked == ("good", "strict", "FASTTRAIN_KERNELS", "full", False, ("other",))
    with use(autotune="cached", deterministic=True, providers=()), use(mode="auto"):
        asked = settings.wish("toy", caller)
    assert asked == ("good", "auto", "FASTTRAIN_KERNELS", "cached", True, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("autotune=always", "autotune='always'; expected one of off, cached, full"),
        ("deterministic=yes", "deterministic='yes'; expected true or false"),
        ("checked=1", "checked='1'; expected true or false"),
        ("providers=", "providers=''; expected one of all"),
    ],
)
def test_what_a_setting_may_not_be_is_an_error(text, message, monkeypatch):
    op = make("good")
    monkeypatch.setenv("FASTTRAIN_KERNELS", text)
    with pytest.raises(ValueError, match=message):
        op.choose(PROBLEM)


def test_blocks_of_threads_that_overlap_leave_nothing_behind():
    """The first to begin ends first, which a block that puts back what it found would undo."""
    begun, ended = threading.Event(), threading.Event()

    def first():
        with use(mode="eager"):
            begun.set()
            ended.wait()

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    with use(mode="eager"):  # one that equals the other
        ended.set()
        thread.join()
        assert [each.mode for each in settings._overrides] == ["eager"]
    assert settings._overrides == ()


def test_a_block_is_compared_by_what_it_asks_for():
    """So that what was chosen in one is found again in the next."""
    op = make("good")
    with use(mode="auto"):
        chosen = op.select(PROBLEM, "auto")
    with use(mode="auto"):
        assert op.select(PROBLEM, "auto") is chosen
    assert torch.equal(chosen.module.forward(torch.ones(2)), torch.full((2,), 2.0))
