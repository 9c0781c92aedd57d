"""What a proof or a time depends on beside the problem: these kernels, and the machine under them.

Records that were made under another fingerprint are not looked at: after an update of torch, of a
driver or of these kernels everything is proven, and may be timed, anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
PROVIDERS = ("flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel")
DRIVER = Path("/proc/driver/nvidia/version")


@functools.cache
def fingerprint(device_type: str, index: int | None = None) -> dict[str, str]:
    """By name: the kernels' source, the versions of what they run on, the device and its driver."""
    facts = {
        "kernels": source_digest(),
        "torch": torch.__version__,
        "triton": installed_version("triton") or "absent",
        "device": device_name(device_type, index),
    }
    if device_type == "cuda":
        facts |= {"cuda": str(torch.version.cuda), "driver": _driver()}
    installed = ((name, installed_version(name)) for name in PROVIDERS)
    return facts | {name: found for name, found in installed if found is not None}


def digest(facts: dict[str, str]) -> str:
    """Sixteen hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def source_digest() -> str:
    """Of every source file of this package and of its native libraries."""
    found = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("*.so")]):
        found.update(str(path.relative_to(PACKAGE)).encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def device_name(device_type: str, index: int | None = None) -> str:
    """The processor's or the GPU's name as its maker gives it."""
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(index)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a file's: "Intel(R) Xeon(R) Processor" -> "intel-xeon-processor"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", name.lower())).strip("-")


def installed_version(distribution: str) -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _driver() -> str:
    """The driver's version line, as the kernel module gives it; containers show it too."""
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"
