"""bench/harness.py, memory.py and report.py: what is counted, how often, and what is shown."""

import gc
import json
import time

import pytest
import torch
from fasttrain_kernels import memory

from bench import harness, report
from bench.harness import Absent, Case, Ceilings, Provider

MIB = 2**20
CEILINGS = Ceilings(copy=1e10, matmul=1e11, matmul_dtype="float32")


def run(others, ours, rounds):
    for _ in range(rounds):
        others()
        ours()


def timed(case, *providers):
    return harness.time_providers(case, list(providers), "ours", "cpu", run)


def row_of(case, *providers):
    return harness.row(case, timed(case, *providers), CEILINGS, "ours", "eager")


def nothing():
    time.sleep(1e-4)


def provider(name, step=nothing, **options):
    return Provider(name, lambda: step, **options)


@pytest.fixture(scope="module", autouse=True)
def no_old_objects_to_look_through():
    """Every measurement collects garbage: half a second for all that a test process holds."""
    gc.freeze()
    yield
    gc.unfreeze()


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1


@pytest.fixture
def short_case(monkeypatch):
    """No time for more rounds than the case asks for."""
    monkeypatch.setattr(harness, "SECONDS_PER_CASE", 0.0)
    return Case("op", "case", bytes=100, rounds=3)


needs_peaks = pytest.mark.skipif(not memory.lower_peak(), reason="the kernel keeps no peaks for us")


# --- how often -----------------------------------------------------------------------------------


def test_every_provider_is_sampled_in_every_round(short_case):
    found = timed(short_case, provider("ours"), provider("eager"))
    assert [len(found[name].samples) for name in ("ours", "eager")] == [3, 3]


def test_short_cases_get_more_rounds_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(harness, "SHORTEST_SAMPLE", 0.0)
    found = timed(Case("op", "case", bytes=100, rounds=3), provider("ours"))
    assert len(found["ours"].samples) == 10 * harness.ROUNDS


def test_a_peer_that_takes_too_long_is_called_once(short_case):
    step = Counter()
    slow = provider("slow", step, compiles=False, longest=0.0)
    found = timed(short_case, provider("ours"), slow)
    assert len(found["slow"].samples) == 1
    assert len(found["ours"].samples) == 3


def test_a_long_call_that_compiles_nothing_is_not_repeated(short_case, monkeypatch):
    monkeypatch.setattr(harness, "LONG_CALL", 0.0)
    once, twice = Counter(), Counter()
    timed(
        short_case,
        provider("ours"),
        provider("eager", once, compiles=False, longest=0.0),
        provider("compiled", twice, longest=0.0),
    )
    assert (once.calls, twice.calls) == (1, 2)


def test_ours_is_sampled_however_long_it_takes(short_case):
    assert len(timed(short_case, provider("ours", longest=0.0))["ours"].samples) == 3


# --- who can't run -------------------------------------------------------------------------------


def test_absent_and_failing_peers_are_rows_with_the_reason(short_case):
    def absent():
        raise Absent("not installed")

    def fails():
        raise RuntimeError("no kernel image\nand a long story")

    row = row_of(short_case, provider("ours"), Provider("a", absent), provider("b", fails),
                 Provider("eager", absent))  # fmt: skip
    assert row["providers"]["a"] == {"absent": "not installed"}
    assert row["providers"]["b"] == {"absent": "fails: RuntimeError: no kernel image"}
    assert row["speedup"] is None and row["workspace_of_baseline"] is None
    json.dumps(row)


def test_ours_must_not_fail(short_case):
    def fails():
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        timed(short_case, provider("ours", fails))


# --- memory --------------------------------------------------------------------------------------


def holding(temporary, output):
    """A step that holds `temporary` MiB for a while, and returns a tensor of `output` MiB."""

    def step():
        torch.ones(temporary * MIB // 4).sum()
        return torch.ones(output * MIB // 4)

    return step


@needs_peaks
def test_workspace_is_the_peak_without_the_results(short_case):
    case = Case("op", "case", bytes=100, output_bytes=16 * MIB, rounds=3)
    row = row_of(case, provider("ours", holding(32, 16)), provider("eager", holding(80, 16)))
    assert row["providers"]["eager"]["peak_bytes"] == pytest.approx(80 * MIB, abs=4 * MIB)
    assert row["providers"]["eager"]["workspace_bytes"] == pytest.approx(64 * MIB, abs=4 * MIB)
    assert row["workspace_of_baseline"] == pytest.approx(16 / 64, abs=0.1)


@needs_peaks
def test_peaks_don_t_add_up():
    peaks = []
    for _ in range(3):
        with memory.PeakMemory("cpu") as peak:
            holding(64, 1)()
        peaks.append(peak.bytes)
    assert peaks == [pytest.approx(64 * MIB, abs=4 * MIB)] * 3


@pytest.mark.parametrize("writable", [False, True])
def test_no_peak_where_it_can_t_be_lowered(short_case, tmp_path, monkeypatch, writable):
    if writable:  # and without effect
        (tmp_path / "clear_refs").touch()
        (tmp_path / "status").write_text("VmHWM:\t  900000 kB\nVmRSS:\t  500000 kB\n")
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    with memory.PeakMemory("cpu") as peak:
        pass
    assert peak.bytes is None
    case = Case("op", "case", bytes=100, output_bytes=16, rounds=3)
    assert (
        row_of(case, provider("ours"), provider("eager"))["providers"]["ours"]["workspace_bytes"]
        is None
    )


# --- rows and reports ----------------------------------------------------------------------------


def test_errors_of_the_result_are_in_the_row(short_case):
    case = Case("op", "case", 100, errors=lambda result: {"loss_error": abs(result - 2) / 2})
    row = row_of(case, provider("ours", lambda: 2.0), provider("eager", lambda: 2.25))
    assert row["providers"]["ours"]["loss_error"] == 0
    assert row["providers"]["eager"]["loss_error"] == 0.125


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 1.0), ({"flops": 1}, None), ({"flops": 1, "predicted_seconds": 2e-3}, 2.0)],
)
def test_prediction(short_case, options, expected):
    case = Case("op", "case", bytes=int(harness.H200_COPY * 1e-3), rounds=3, **options)
    assert row_of(case, provider("ours"), provider("eager"))["predicted_h200_ms"] == expected


def made_report(*cases):
    machine = {"device": "A processor", "threads": 2, "torch": "2", "date": "today",
               "load_before": 0, "load_after": 1}  # fmt: skip
    return {"machine": machine, "ceilings": vars(CEILINGS), "cases": list(cases)}


def test_report_shows_memory_and_errors(short_case, tmp_path):
    def absent():
        raise Absent("not installed")

    def row(name, **options):
        case = Case("op", name, 100, flops=100, output_bytes=0, rounds=3, **options)
        slow = provider("slow", compiles=False, longest=0.0)
        return row_of(case, provider("ours"), provider("eager"), slow, Provider("peer", absent))

    rows = [row("a", errors=lambda result: {"loss_error": 0.14}), row("b")]
    rows[1]["providers"]["eager"] = {"absent": "takes minutes"}
    (tmp_path / "op.json").write_text(json.dumps(made_report(*rows)))
    report.main([tmp_path])
    text = (tmp_path / "report.md").read_text()
    assert "| loss error |" in text and "| 0.14 |" in text and "¹" in text
    assert "Not run: peer: not installed." in text
    assert "Not run: eager (b): takes minutes." in text
    assert (tmp_path / "op.png").stat().st_size > 0


def test_report_of_an_op_without_them_has_one_table(short_case):
    row = row_of(short_case, provider("ours"), provider("eager"))
    for found in row["providers"].values():
        del found["workspace_bytes"]  # as in results of before it was measured
    text = report.table(made_report(row))
    assert "at copy speed" in text and "¹" not in text
    assert report.details(made_report(row)) is None
