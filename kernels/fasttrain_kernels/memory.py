"""The memory that a piece of code holds, and how much is free.

On a GPU, of tensors as PyTorch's allocator counts them. On a CPU, resident, of the whole process.
"""

import contextlib
import ctypes
import gc
import re
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
MEMORY = Path("/proc/meminfo")
LOWERS_PEAK = "5"  # what clear_refs takes to set the high-water mark to what is resident now
TOLERANCE = 2**24  # the kernel's counts of pages lag behind by some per thread


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`; afterwards `peak.bytes`, or None where nobody counts.

    On a GPU, of tensors as PyTorch's allocator counts them. On a CPU, of resident memory, which is
    the whole process's: nothing else may run in it. `collects`: garbage first, which takes a tenth
    of a second in a process of some size.
    """

    def __init__(self, device: str, *, collects: bool = True) -> None:
        self.device, self.collects = device, collects
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.collects:
            gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before: int | None = torch.cuda.memory_allocated()
        else:
            give_back_freed_memory()
            self.before = resident() if lower_peak() else None
        return self

    def __exit__(self, *raised: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - (self.before or 0)
        elif self.before is not None:
            self.bytes = max(0, highest_resident() - self.before)


def ran_out(error: Exception) -> bool:
    """Whether an exception says that there was no memory: nobody's fault. That of a CPU is a plain
    RuntimeError, PyTorch's own or C++'s."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "bad_alloc" in str(error)


def free(device: torch.device) -> int:
    """Bytes that are free on the device; a fixed 4 GB where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", MEMORY.read_text())
    except OSError:  # not Linux
        found = None
    return int(found[1]) * 1024 if found else 4 * 10**9


def held(device: torch.device) -> int:
    """Bytes that are held on the device now; 0 where nobody says."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return resident()
    except (OSError, KeyError):
        return 0


def give_back_freed_memory() -> None:
    """So that it isn't resident, and counts when it is taken again."""
    with contextlib.suppress(OSError, AttributeError):  # a C library of another kind
        ctypes.CDLL(None).malloc_trim(0)


def lower_peak() -> bool:
    """Whether the high-water mark could be set to what is resident now."""
    try:
        (PROCESS / "clear_refs").write_text(LOWERS_PEAK)
        return highest_resident() - resident() < TOLERANCE
    except (OSError, KeyError):  # not Linux, or not allowed
        return False


def resident() -> int:
    return _status("VmRSS")


def highest_resident() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", (PROCESS / "status").read_text(), re.M))
    return int(lines[name]) * 1024
