"""How an op is timed against its peers: interleaved, in one process, beside the device's limits.

A case is one problem; its providers are the ways to compute it. Every round times each provider
once, so that a neighbour on the machine disturbs all alike; the least time counts. A provider that
can't run here is a row with the reason. So is a peer that fails; one that takes half a minute a
call is called once.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fasttrain_kernels.fingerprint import device_name
from fasttrain_kernels.memory import PeakMemory
from fasttrain_kernels.timing import sample

# What an H200 was measured to reach: a prediction that a run on one can be held against.
H200_COPY = 4.3e12  # bytes/s, read and written
H200_MATMUL = 790e12  # bfloat16 FLOP/s

ROUNDS = 15  # at least, where a case doesn't say another number; ten times as many at most
SECONDS_PER_CASE = 8.0
SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample
LONG_CALL = 1.0  # seconds; the first call is enough to know the time and memory of such a one
LONGEST_CALL = 30.0  # seconds; a peer that takes longer is called once


class Absent(Exception):  # noqa: N818  (not an error: a peer that isn't installed)
    """Raised by a provider's `build` where it can't run; says why."""


@dataclass(frozen=True)
class Case:
    """One problem, and the work that no implementation can avoid."""

    op: str
    name: str
    bytes: int  # read and written, each tensor once
    flops: int = 0  # of matrix products; elementwise arithmetic hides behind memory
    output_bytes: int | None = None  # of what a call returns; the rest of its peak is workspace
    predicted_seconds: float | None = None  # on an H200, where more is known than bytes
    rounds: int = ROUNDS  # at least
    # What is wrong with a provider's result: name -> relative error.
    errors: Callable[[Any], dict[str, float]] = lambda result: {}

    def seconds_at(self, copy: float, matmul: float) -> float:
        """The least time at these rates."""
        return max(self.bytes / copy, self.flops / matmul)

    def h200_seconds(self) -> float | None:
        """What an H200 should take; None where products would need a model that nobody gave."""
        if self.predicted_seconds is None and not self.flops:
            return self.bytes / H200_COPY
        return self.predicted_seconds


@dataclass(frozen=True)
class Provider:
    """A way to compute a case. `build()` returns the call to time, or raises Absent."""

    name: str
    build: Callable[[], Callable[[], object]]
    compiles: bool = True  # or tunes, so that the first call says nothing about the others
    longest: float = LONGEST_CALL  # seconds; called once if a call takes longer
    settles: bool = (
        False  # a call before each sample isn't timed: memory is as its own calls leave it
    )


@dataclass
class Timing:
    """The samples of one provider, in seconds a call; or why there are none."""

    samples: list[float] = field(default_factory=list)
    absent: str | None = None
    peak_bytes: int | None = None  # above what was held before the call
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches, measured in this run."""

    copy: float  # bytes/s, read and written
    matmul: float  # FLOP/s, in the dtype that the device multiplies fastest
    matmul_dtype: str


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
    case: Case,
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
        timing, is_ours = timings[provider.name], provider.name == ours
        try:
            step = provider.build()
            once = _first_calls(step, provider, case, device, timing)
        except Absent as reason:
            timing.absent = str(reason)
            continue
        except Exception as error:
            if is_ours:
                raise
            timing.absent = f"fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        if once > provider.longest and not is_ours:
            timing.samples.append(once)
            continue
        calls[provider.name] = max(1, math.ceil(SHORTEST_SAMPLE / once))
        round_seconds += once * calls[provider.name]
        steps[provider.name] = step

    settling = {provider.name for provider in providers if provider.settles}

    def take(name: str) -> None:
        if name in settling:
            steps[name]()
        timings[name].samples.append(sample(steps[name], device, calls[name]))

    def take_others() -> None:
        for name in steps:
            if name != ours:
                take(name)

    rounds = max(case.rounds, min(10 * ROUNDS, int(SECONDS_PER_CASE / round_seconds)))
    run(take_others, lambda: take(ours), rounds)
    return timings


def _first_calls(
    step: Callable[[], object], provider: Provider, case: Case, device: str, timing: Timing
) -> float:
    """Seconds a call, of the calls before the rounds; they also find memory and errors."""
    once, peak, result = _observed(step, device)
    timing.errors = case.errors(result)
    del result  # so that it isn't there when memory is measured
    if provider.compiles:
        once, peak = _observed(step, device)[:2]
    if once < LONG_CALL:
        peak = min(peak, _observed(step, device)[1]) if peak is not None else None
        once = min(sample(step, device) for _ in range(3))
    timing.peak_bytes = peak
    return once


def _observed(step: Callable[[], Any], device: str) -> tuple[float, int | None, Any]:
    """One call: its seconds, its peak memory, its result."""
    with PeakMemory(device) as peak:
        begin = time.perf_counter()
        result = step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds, peak.bytes, result


def row(
    case: Case, timings: dict[str, Timing], ceilings: Ceilings, ours: str, baseline: str
) -> dict[str, object]:
    """What is kept of a case: JSON, times in milliseconds."""
    floor = case.seconds_at(ceilings.copy, ceilings.matmul)
    predicted = case.h200_seconds()
    least = {name: min(timing.samples) for name, timing in timings.items() if timing.samples}
    workspace = {name: _workspace(case, timing) for name, timing in timings.items()}
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
            "workspace_bytes": workspace[name],
            **{error: float(f"{value:.3g}") for error, value in timing.errors.items()},
        }
    return {
        "case": case.name,
        "bytes": case.bytes,
        "flops": case.flops,
        "output_bytes": case.output_bytes,
        "floor_ms": round(floor * 1e3, 4),
        "predicted_h200_ms": None if predicted is None else round(predicted * 1e3, 4),
        "speedup": _ratio(least.get(baseline), least[ours]),
        "workspace_of_baseline": _ratio(workspace[ours], workspace[baseline]),
        "baseline": baseline,
        "ours": ours,
        "providers": providers,
    }


def _workspace(case: Case, timing: Timing) -> int | None:
    """What a call holds at its peak beyond the room for its results."""
    if timing.peak_bytes is None or case.output_bytes is None:
        return None
    return max(0, timing.peak_bytes - case.output_bytes)


def _ratio(value: float | None, other: float | None) -> float | None:
    return round(value / other, 3) if value is not None and other else None


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
