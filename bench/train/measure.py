"""What every contender measures, in the same words: one process, one JSON line.

Needs torch and the standard library only, so that it runs in every peer's environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from workload import Workload

IGNORED_LABEL = -100
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "deepspeed",
    "trl",
    "arctic-training",
)


@dataclass(frozen=True)
class Job:
    """What one contender's process is asked to do."""

    folder: Path  # made by prepare.py
    output: Path  # an empty directory of its own
    variant: str
    seed: int  # of the order of the chats
    workload: Workload

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def chats(self) -> str:
        return str(self.folder / "chats.jsonl")

    def rows(self) -> list[dict[str, Any]]:
        """The chats, one `{"messages": [...]}` each."""
        with open(self.chats, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]


def read_job(variants: Sequence[str]) -> Job:
    """Read the command line that run.py writes, and fix the number of threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variant", choices=variants, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.output.mkdir(parents=True, exist_ok=True)
    workload = Workload.load(given.folder)
    return Job(given.folder, given.output, given.variant, given.seed, workload)


@dataclass(frozen=True)
class BatchCount:
    """What one optimizer step consumed. `cells` counts padding too."""

    tokens: int
    supervised: int
    cells: int


def count_batch(labels: torch.Tensor, attention_mask: torch.Tensor) -> BatchCount:
    """Of a padded batch, both (B, L). The first label of a row is never predicted."""
    return BatchCount(
        tokens=int(attention_mask.sum()),
        supervised=int((labels[:, 1:] != IGNORED_LABEL).sum()),
        cells=attention_mask.numel(),
    )


class Stopwatch:
    """Times the steps after the warm-up. Waits for the GPU at the two ends, nowhere between."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.ends: list[float] = []  # when each step ended
        self._cpu_seconds = [0.0, 0.0]

    def step_ended(self, total_steps: int) -> None:
        """Call at the end of every optimizer step, with the number of steps of the whole run."""
        number = len(self.ends) + 1
        if number in (self.warmup, total_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._cpu_seconds[number == total_steps] = time.process_time()
        self.ends.append(time.perf_counter())

    def result(self) -> dict[str, Any]:
        """Seconds of the measured steps, and of each on its own."""
        measured = self.ends[self.warmup - 1 :]
        steps = sorted(b - a for a, b in pairwise(measured))
        return {
            "steps": len(steps),
            "seconds": measured[-1] - measured[0],
            "cpu_seconds": self._cpu_seconds[1] - self._cpu_seconds[0],
            "step_seconds_p50": statistics.median(steps),
            "step_seconds_p95": steps[min(len(steps) - 1, round(0.95 * len(steps)))],
        }


def throughput(counts: Sequence[BatchCount], watch: Stopwatch) -> dict[str, Any]:
    """Tokens of the measured steps over their seconds; `counts` has every step, warm-up too."""
    assert len(counts) == len(watch.ends), f"{len(counts)} batches in {len(watch.ends)} steps"
    measured, times = counts[watch.warmup :], watch.result()
    tokens = sum(count.tokens for count in measured)
    supervised = sum(count.supervised for count in measured)
    cells = sum(count.cells for count in measured)
    return {
        **times,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "padding": 1 - tokens / cells,
        "tokens_per_second": tokens / times["seconds"],
        "supervised_tokens_per_second": supervised / times["seconds"],
        "tokens_per_cpu_second": tokens / times["cpu_seconds"],
    }


def peak_memory() -> dict[str, int]:
    """Bytes at most: resident memory of this process since its start, and of the GPU."""
    peak = {"peak_rss_bytes": _peak_rss()}
    if torch.cuda.is_available():
        peak["cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        peak["cuda_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return peak


def _peak_rss() -> int:
    # ru_maxrss begins with what the parent held when it forked; VmHWM is this process's own.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """Of the packages that decide the figures, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def report(**values: Any) -> None:
    """Print the one line that run.py reads, after whatever the contender has printed."""
    line = {
        **values,
        **peak_memory(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average_after": os.getloadavg()[0],
    }
    print("\n" + json.dumps(line), flush=True)
