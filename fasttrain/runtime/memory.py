"""Peak memory of a run."""

from __future__ import annotations

import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes held so far: by PyTorch's tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_process_bytes()


def reset_peak_memory(device: torch.device) -> None:
    """Begin a GPU's peak anew, as for a second run in one process. A process's own can't be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_process_bytes() -> int:
    """Largest resident size of this process so far; 0 where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
