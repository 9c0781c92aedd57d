"""Which device a run uses."""

from __future__ import annotations

from typing import Literal

import torch


def choose_device(requested: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Resolve `engine.device`. RuntimeError when CUDA is asked for and not there."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible to torch")
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def describe_device(device: torch.device) -> str:
    """A device as the user knows it, such as `NVIDIA H200` or `CPU, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
