"""Whether the machine is quiet enough for a time to mean something."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Processors kept busy by others. One busy neighbour costs a two-thread run up to 17 times.
QUIET_LOAD = 0.3
SAMPLE_SECONDS = 1.0


def load_average() -> float:
    """Processes that wanted to run, averaged over the last minute."""
    return os.getloadavg()[0]


def busy_processors() -> float:
    """How many processors the whole machine keeps busy right now; load_average() where unknown."""
    before = _ticks()
    if before is None:
        return load_average()
    time.sleep(SAMPLE_SECONDS)
    after = _ticks()
    assert after is not None
    busy, total = after[0] - before[0], after[1] - before[1]
    return (os.cpu_count() or 1) * busy / max(total, 1)


def _ticks() -> tuple[int, int] | None:
    """(busy, all) clock ticks of all processors since the start, as Linux counts them."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ticks = [int(value) for value in path.read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
    return sum(ticks) - idle, sum(ticks)
