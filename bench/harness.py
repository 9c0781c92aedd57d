"""How an op is timed against its peers: interleaved, in one process, beside the device's limits.

A case is one problem; its providers are the ways to compute it. Every round times each provider
once, so that a neighbour on the machine disturbs all alike; the least time counts. A provider that
can't run here is a row with the reason.
"""

import contextlib
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# What an H200 was measured to reach: a prediction that a run on one can be held against.
H200_COPY = 4.3e12  # bytes/s, read and written
H200_MATMUL = 790e12  # bfloat16 FLOP/s

ROUNDS = 15
SECONDS_PER_CASE = 8.0
SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample


class Absent(Exception):  # noqa: N818  (not an error: a peer that isn't installed)
    """Raised by a provider's `build` where it can't run; says why."""


@dataclass(frozen=True)
class Case:
    """One problem, and the work that no implementation can avoid."""

    op: str
    name: str
    bytes: int  # read and written, each tensor once
    flops: int = 0  # of matrix products; elementwise arithmetic hides behind memory

    def seconds_at(self, copy: float, matmul: float) -> float:
        """The least time at these rates."""
        return max(self.bytes / copy, self.flops / matmul)


@dataclass(frozen=True)
class Provider:
    """A way to compute a case. `build()` returns the call to time, or raises Absent."""

    name: str
    build: Callable[[], Callable[[], object]]


@dataclass
class Timing:
    """The samples of one provider, in seconds a call; or why there are none."""

    samples: list[float] = field(default_factory=list)
    absent: str | None = None
    peak_bytes: int | None = None  # above what was allocated before the call; CUDA only


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches, measured in this run."""

    copy: float  # bytes/s, read and written
    matmul: float  # FLOP/s, in the dtype that the device multiplies fastest
    matmul_dtype: str


def sample(step: Callable[[], object], device: str, calls: int = 1) -> float:
    """Seconds a call, of `calls` in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def measure_ceilings(device: str) -> Ceilings:
    """The best of several large copies and matrix products."""
    size = 2**31 if device == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = min(sample(lambda: target.copy_(source), device) for _ in range(10))
    dtype, width = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 2048)
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    matmul = min(sample(lambda: a @ b, device) for _ in range(10))
    return Ceilings(2 * size / copy, 2 * width**3 / matmul, str(dtype).removeprefix("torch."))


def time_providers(
    providers: list[Provider],
    ours: str,
    device: str,
    run: Callable[[Callable[[], None], Callable[[], None], int], None],
) -> dict[str, Timing]:
    """Times every provider in every round. `run(others, ours, rounds)` makes the rounds: it calls
    `others`, which takes a sample of each peer, and then `ours`, again and again."""
    timings = {provider.name: Timing() for provider in providers}
    steps, calls, round_seconds = {}, {}, 0.0
    for provider in providers:
        try:
            step = provider.build()
            step()  # compiles, tunes, touches memory
        except Absent as reason:
            timings[provider.name].absent = str(reason)
            continue
        once = min(sample(step, device) for _ in range(3))
        calls[provider.name] = max(1, math.ceil(SHORTEST_SAMPLE / once))
        round_seconds += once * calls[provider.name]
        timings[provider.name].peak_bytes = _peak_bytes(step, device)
        steps[provider.name] = step

    def take(name: str) -> None:
        timings[name].samples.append(sample(steps[name], device, calls[name]))

    def take_others() -> None:
        for name in steps.keys() - {ours}:
            take(name)

    rounds = max(ROUNDS, min(10 * ROUNDS, int(SECONDS_PER_CASE / round_seconds)))
    run(take_others, lambda: take(ours), rounds)
    return timings


def _peak_bytes(step: Callable[[], object], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def row(
    case: Case, timings: dict[str, Timing], ceilings: Ceilings, ours: str, baseline: str
) -> dict[str, object]:
    """What is kept of a case: JSON, times in milliseconds."""
    floor = case.seconds_at(ceilings.copy, ceilings.matmul)
    least = {name: min(timing.samples) for name, timing in timings.items() if timing.samples}
    providers: dict[str, object] = {}
    for name, timing in timings.items():
        if timing.absent is not None:
            providers[name] = {"absent": timing.absent}
            continue
        providers[name] = {
            "ms": round(least[name] * 1e3, 4),
            "median_ms": round(statistics.median(timing.samples) * 1e3, 4),
            "rounds": len(timing.samples),
            "of_floor": round(floor / least[name], 3),
            "times_ours": round(least[name] / least[ours], 3),
            "peak_bytes": timing.peak_bytes,
        }
    return {
        "case": case.name,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_ms": round(floor * 1e3, 4),
        "predicted_h200_ms": round(case.seconds_at(H200_COPY, H200_MATMUL) * 1e3, 4),
        "speedup": round(least[baseline] / least[ours], 3),
        "baseline": baseline,
        "ours": ours,
        "providers": providers,
    }


def chosen_device(config: Any) -> str:
    """The device that pytest was told to measure, or the best there is."""
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: str) -> dict[str, object]:
    """What the figures were measured on. No host name."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": load(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def load() -> float:
    """Processes that wanted to run, averaged over the last minute; ours are among them."""
    return round(os.getloadavg()[0], 2)


def device_name(device: str) -> str:
    """The processor's name as its maker gives it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a folder's: "Intel(R) Xeon(R) Processor" -> "intel-xeon-processor"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", name.lower())).strip("-")
