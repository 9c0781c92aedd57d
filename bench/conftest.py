"""Fixtures of the op benchmarks: the device, its ceilings, and where results go."""

import functools
import json
from pathlib import Path

import pytest
from fasttrain_kernels import check
from fasttrain_kernels.fingerprint import device_name, slug
from fasttrain_kernels.registry import OPS

from bench import harness

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    parser.addoption("--device", default=None, help="cpu or cuda; default: cuda if there")
    parser.addoption("--compile", action="store_true", help="bench_auto: torch.compile's code too")


@pytest.fixture(scope="session")
def device(request):
    return harness.chosen_device(request.config)


@pytest.fixture(scope="session")
def ceilings(device):
    found = harness.measure_ceilings(device)
    print(
        f"\n{device_name(device)}: copy {found.copy / 1e9:.1f} GB/s, "
        f"matmul {found.matmul / 1e9:.0f} GFLOP/s {found.matmul_dtype}"
    )
    return found


@pytest.fixture(scope="session")
def results(device, ceilings):
    """Rows by op, written at the end of the run to bench/results/<device>/<op>.json."""
    about = harness.machine(device)
    rows = {}
    yield rows
    folder = RESULTS / slug(about["device"])
    about["load_after"] = harness.load()
    for op, found in rows.items():
        folder.mkdir(parents=True, exist_ok=True)
        report = {"machine": about, "ceilings": vars(ceilings), "cases": found}
        (folder / f"{op}.json").write_text(json.dumps(report, indent=1) + "\n")


@functools.cache
def self_test(op, device):
    """Of a case's op, if it is one."""
    return check(op, device=device) if op in OPS else ()


@pytest.fixture
def compare(benchmark, device, ceilings, results, capsys):
    """compare(case, providers, ours=, baseline=): times them, prints and keeps the row."""

    def rounds(others, ours, count):
        # pytest-benchmark's own table is of ours; the peers are timed just before, every time.
        benchmark.pedantic(ours, setup=others, rounds=count)

    def run(case, providers, *, ours, baseline):
        failed = [
            row.backend for row in self_test(case.op, device) if row.parity and not row.passed
        ]
        assert not failed, f"{case.op}: {failed} fail the self-test; nothing wrong is timed"
        timings = harness.time_providers(case, providers, ours, device, rounds)
        row = harness.row(case, timings, ceilings, ours, baseline)
        benchmark.extra_info.update(row)
        results.setdefault(case.op, []).append(row)
        with capsys.disabled():
            print(f"\n{case.name}: {describe(row)}", end=" ")

    return run


def describe(row):
    parts = [f"floor {row['floor_ms']:.3g} ms"]
    for name, found in row["providers"].items():
        if "absent" in found:
            parts.append(f"{name} absent ({found['absent']})")
        else:
            parts.append(f"{name} {found['ms']:.3g} ms{workspace(found)}")
    text = ", ".join(parts)
    return text if row["speedup"] is None else f"{text}; {row['speedup']:.2f}x {row['baseline']}"


def workspace(found):
    held = found["workspace_bytes"]
    return "" if held is None else f" {held / 1e6:.0f} MB"
