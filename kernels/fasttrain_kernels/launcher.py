"""What Triton needs of the machine to launch a kernel on a GPU.

It compiles its kernels itself, but the code that hands them to the CUDA driver is a Python
extension in C, which it builds with the machine's compiler before the first launch.
"""

import functools
import os
import shutil
import sysconfig
from pathlib import Path


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
