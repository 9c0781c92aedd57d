"""Loads the native libraries, once, when a kernel needs one, and remembers why it could not.

setup.py leaves beside this file `_C_cpu.so` and `_C_cuda.so` or, where it could not build one,
`_C_cpu.missing` or `_C_cuda.missing`, a line of text that says what was missing.
"""

import functools
from pathlib import Path

import torch

from fasttrain_kernels.checks import short

HERE = Path(__file__).parent


@functools.cache
def why_not(library: str) -> str | None:
    """Load `library` ("_C_cpu" or "_C_cuda") if it is not loaded yet.

    Returns None when its part of `torch.ops.fasttrain_native` is ready to be called, else the
    reason. The CPU library is loaded first: it defines what both implement.
    """
    if library == "_C_cuda":
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) has no CUDA"
        if (reason := why_not("_C_cpu")) is not None:
            return reason
    path = HERE / f"{library}.so"
    note = HERE / f"{library}.missing"
    if not path.exists():
        built = note.read_text().strip() if note.exists() else "this install did not build it"
        return f"{library}.so is missing: {built}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{library}.so does not load: {error}"
    return None


def cpu_why_not(
    device: torch.device, dtype: torch.dtype, served: tuple[torch.dtype, ...]
) -> str | None:
    """Why the C++ kernels that serve these dtypes can't run, or None; loads their library."""
    if device.type != "cpu":
        return f"runs on CPUs; the tensors are on {device.type}"
    if dtype not in served:
        return f"serves {', '.join(map(short, served))}, not {short(dtype)}"
    return why_not("_C_cpu")


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run in: "generic", "avx2" or "avx512"."""
    reason = why_not("_C_cpu")
    assert reason is None, reason
    return str(torch.ops.fasttrain_native.cpu_isa())


@functools.cache
def cuda_why_not(device: torch.device) -> str | None:
    """Why the CUDA kernels can't run on `device`, or None; loads their library."""
    if (reason := why_not("_C_cuda")) is not None:
        return reason
    if not torch.cuda.is_available():
        return "this process sees no CUDA device"
    index = torch.cuda.current_device() if device.index is None else device.index
    error = str(torch.ops.fasttrain_native.cuda_error(index))
    return f"_C_cuda.so does not run on this device: {error}" if error else None
