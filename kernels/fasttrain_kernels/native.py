"""Loads the native libraries, once, when a kernel needs one, and remembers why it could not.

setup.py leaves beside this file either `_C_cpu.so` or, where it could not build one,
`_C_cpu.missing`, a line of text that says what was missing.
"""

import functools
from pathlib import Path

import torch

HERE = Path(__file__).parent


@functools.cache
def why_not(library: str) -> str | None:
    """Load `library` ("_C_cpu") if it is not loaded yet.

    Returns None when `torch.ops.fasttrain_native` is ready to be called, else the reason.
    """
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


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run in: "generic", "avx2" or "avx512"."""
    reason = why_not("_C_cpu")
    assert reason is None, reason
    return str(torch.ops.fasttrain_native.cpu_isa())
