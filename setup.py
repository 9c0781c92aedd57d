"""Builds the native libraries during `pip install`; everything else is in pyproject.toml.

FT_SKIP_NATIVE=1 leaves them out; MAX_JOBS limits the compiler processes. Without a compiler, CMake
or Ninja the install goes on: eager PyTorch and Triton serve, and a note beside the package lets the
kernel table say what was missing. A compiler that fails on our code is an error.
"""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "_C_cpu"


def find_tool(name: str) -> str | None:
    """pip's `cmake` or `ninja` where this environment has it, for the system's may be too old."""
    with suppress(PackageNotFoundError):
        for file in distribution(name).files or ():
            path = Path(file.locate())
            if path.name == name and os.access(path, os.X_OK) and path.is_file():
                return str(path)
    return shutil.which(name)


def missing_tools() -> str | None:
    """Why the native library can't be built here, or None."""
    if os.environ.get("FT_SKIP_NATIVE", "0") not in ("", "0"):
        return "the install was told FT_SKIP_NATIVE=1"
    if not sys.platform.startswith("linux"):
        return f"native kernels are built on Linux only, not on {sys.platform}"
    chosen = os.environ.get("CXX", "").split()
    compilers = chosen[:1] or ["c++", "g++", "clang++"]
    absent = [name for name in ("cmake", "ninja") if find_tool(name) is None]
    if not any(map(shutil.which, compilers)):
        absent.insert(0, f"C++ compiler ({' or '.join(compilers)})")
    if find_spec("torch") is None:
        absent.append("torch (for its headers)")
    if not absent:
        return None
    return f"the install found no {' and no '.join(absent)}; get it, then install again"


def compile_library(build_dir: Path, jobs: str) -> Path:
    """Runs CMake and Ninja; returns the path of the library."""
    torch_dir = Path(find_spec("torch").origin).parent
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    build_dir.mkdir(parents=True, exist_ok=True)
    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DTORCH_DIR={torch_dir}"]
    subprocess.run([cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *options], check=True)
    subprocess.run([cmake, "--build", build_dir, "--parallel", jobs], check=True)
    return build_dir / f"{LIBRARY}.so"


class BuildNative(build_ext):
    """Puts `_C_cpu.so`, or a note on why there is none, beside fasttrain_kernels/__init__.py."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        note = target.with_suffix(".missing")
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in (target, note):
            stale.unlink(missing_ok=True)
        missing = missing_tools()
        if missing is not None:
            print(f"fasttrain: no native CPU kernels: {missing}", file=sys.stderr)
            note.write_text(f"{missing}\n")
            return
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            built = compile_library(Path(self.build_temp).resolve() / "native", jobs)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"fasttrain: building the native CPU kernels failed: {error}\n"
                "The compiler's messages are above. FT_SKIP_NATIVE=1 installs without them."
            ) from error
        shutil.copy2(built, target)

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"  # no Python in it: any version loads it

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the library, or the note, goes into the source tree."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            inplace = ROOT / "kernels" / self.get_ext_filename(ext.name)
            for suffix in (".so", ".missing"):
                inplace.with_suffix(suffix).unlink(missing_ok=True)
                if built.with_suffix(suffix).exists():
                    shutil.copy2(built.with_suffix(suffix), inplace.with_suffix(suffix))


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the library knows torch's stable ABI and no Python at all."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"fasttrain_kernels.{LIBRARY}", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
