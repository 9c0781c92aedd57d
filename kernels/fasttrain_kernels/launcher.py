"""What Triton needs of the machine to launch a kernel on a GPU.

It compiles its kernels itself, but the code that hands them to the CUDA driver is a Python
extension in C, which it builds with the machine's compiler before the first launch.
"""

import functools
import os
import shutil
import sysconfig
from pathlib import Path

import torch

OLDEST = (8, 0)  # compute capability: bfloat16, and copies that run beside the arithmetic


@functools.cache
def why_not() -> str | None:
    """The reason why Triton couldn't build its launcher here, or None. Asked once per process."""
    chosen = os.environ.get("CC")  # Triton's rule (3.7, runtime/build.py): CC, else gcc or clang
    compilers = ("gcc", "clang") if chosen is None else (chosen,)
    if not any(map(shutil.which, compilers)):
        looked_for = "gcc or clang on PATH" if chosen is None else f"CC={chosen!r}"
        return f"Triton builds its launcher with a C compiler, and there is no {looked_for}"
    # Debian's own scheme names a folder for local packages, and Triton sets it aside too.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_path("include", scheme))
    if not (headers / "Python.h").exists():
        return (
            f"Triton builds its launcher in C, and there is no Python.h in {headers} "
            "(Debian and Ubuntu: the package python3-dev)"
        )
    return None


def why_not_on(device: torch.device, *, interpreted: bool) -> str | None:
    """The reason why a Triton kernel can't run on `device`, or None.

    interpreted: Triton's own interpreter runs it (TRITON_INTERPRET=1), on tensors of the CPU.
    """
    if device.type != "cuda" and interpreted:
        return None
    return why_not_gpu(device) or why_not()


def why_not_gpu(device: torch.device) -> str | None:
    """The reason why `device` is no GPU that kernels are made for, or None."""
    if device.type != "cuda":
        return f"runs on CUDA devices; the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "this process sees no CUDA device"
    if (capability := _capability(device)) < OLDEST:
        needed, found = (".".join(map(str, version)) for version in (OLDEST, capability))
        return f"needs compute capability {needed}; this device has {found}"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
