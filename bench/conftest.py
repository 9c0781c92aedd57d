"""Fixtures of the op benchmarks: the device, its ceilings, and where results go."""

import json
from pathlib import Path

import pytest
import torch

from bench import harness

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    parser.addoption("--device", default=None, help="cpu or cuda; default: cuda if there")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ceilings(device):
    found = harness.measure_ceilings(device)
    print(
        f"\n{harness.device_name(device)}: copy {found.copy / 1e9:.1f} GB/s, "
        f"matmul {found.matmul / 1e9:.0f} GFLOP/s {found.matmul_dtype}"
    )
    return found


@pytest.fixture(scope="session")
def results(device, ceilings):
    """Rows by op, written at the end of the run to bench/results/<device>/<op>.json."""
    about = harness.machine(device)
    rows = {}
    yield rows
    folder = RESULTS / harness.slug(about["device"])
    for op, found in rows.items():
        folder.mkdir(parents=True, exist_ok=True)
        report = {"machine": about, "ceilings": vars(ceilings), "cases": found}
        (folder / f"{op}.json").write_text(json.dumps(report, indent=1) + "\n")


@pytest.fixture
def compare(benchmark, device, ceilings, results, capsys):
    """compare(case, providers, ours=, baseline=): times them, prints and keeps the row."""

    def run(case, providers, *, ours, baseline):
        timings = harness.time_providers(
            case,
            providers,
            device,
            lambda one_round, rounds: benchmark.pedantic(one_round, rounds=rounds),
        )
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
            parts.append(f"{name} {found['ms']:.3g} ms")
    return ", ".join(parts) + f"; {row['speedup']:.2f}x {row['baseline']}"
