"""Builds the native libraries during `pip install`; everything else is in pyproject.toml.

FT_SKIP_NATIVE=1 leaves them out; MAX_JOBS limits the compiler processes. Without a compiler, CMake
or Ninja the install goes on: eager PyTorch and Triton serve, and a note beside the package lets the
kernel table say what was missing. A C++ compiler that fails on our code is an error.

FT_CUDA=0 leaves out the CUDA library alone. By default it is built where nvcc is found, and should
nvcc fail, such as for a host compiler newer than it knows, the note says so; FT_CUDA=1 makes both
an error. FT_ARCHS="90" builds it for these GPUs only.
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
CPU, CUDA = LIBRARIES = ("_C_cpu", "_C_cuda")


def find_tool(name: str) -> str | None:
    """pip's `cmake` or `ninja` where this environment has it, for the system's may be too old."""
    with suppress(PackageNotFoundError):
        for file in distribution(name).files or ():
            path = Path(file.locate())
            if path.name == name and os.access(path, os.X_OK) and path.is_file():
                return str(path)
    return shutil.which(name)


def find_nvcc() -> str | None:
    """As CMakeLists.txt finds it."""
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")))
    folders = [
        *(f"{home}/bin" for home in homes),
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
    ]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def missing_tools(library: str) -> str | None:
    """Why `library` can't be built here, or None."""
    if os.environ.get("FT_SKIP_NATIVE", "0") not in ("", "0"):
        return "the install was told FT_SKIP_NATIVE=1"
    if library == CUDA and os.environ.get("FT_CUDA") == "0":
        return "the install was told FT_CUDA=0"
    if not sys.platform.startswith("linux"):
        return f"native kernels are built on Linux only, not on {sys.platform}"
    chosen = os.environ.get("CXX", "").split()
    compilers = chosen[:1] or ["c++", "g++", "clang++"]
    absent = [name for name in ("cmake", "ninja") if find_tool(name) is None]
    if library == CUDA and find_nvcc() is None:
        absent.insert(0, "nvcc (the CUDA toolkit's compiler)")
    if not any(map(shutil.which, compilers)):
        absent.insert(0, f"C++ compiler ({' or '.join(compilers)})")
    if find_spec("torch") is None:
        absent.append("torch (for its headers)")
    if not absent:
        return None
    return f"the install found no {' and no '.join(absent)}; get it, then install again"


def compile_library(library: str, build_dir: Path, jobs: str) -> Path:
    """Runs CMake and Ninja; returns the path of the library.

    Each library has a build folder of its own, so that CMake failing on nvcc stops the one only.
    """
    torch_dir = Path(find_spec("torch").origin).parent
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    build_dir.mkdir(parents=True, exist_ok=True)
    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DTORCH_DIR={torch_dir}", "-DFT_CUDA=0"]
    if library == CUDA:
        options[-1:] = [
            "-DFT_CUDA=1",
            f"-DNVCC={find_nvcc()}",
            f"-DFT_ARCHS={os.environ.get('FT_ARCHS', '')}",
        ]
    subprocess.run([cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *options], check=True)
    build = [cmake, "--build", build_dir, "--target", library, "--parallel", jobs]
    subprocess.run(build, check=True)
    return build_dir / f"{library}.so"


class BuildNative(build_ext):
    """Puts each library, or a note on why there is none, beside fasttrain_kernels/__init__.py."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in (target, target.with_suffix(".missing")):
            stale.unlink(missing_ok=True)
        reason = self.build_library(target)
        if reason is None:
            return
        if target.stem == CUDA and os.environ.get("FT_CUDA") == "1":
            raise SystemExit(f"fasttrain: no {CUDA}.so, which FT_CUDA=1 demands: {reason}")
        print(f"fasttrain: no {target.name}: {reason}", file=sys.stderr)
        target.with_suffix(".missing").write_text(f"{reason}\n")

    def build_library(self, target: Path) -> str | None:
        """Writes `target`, or returns why it can't be."""
        library = target.stem
        missing = missing_tools(library)
        if missing is not None:
            return missing
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            built = compile_library(library, Path(self.build_temp).resolve() / library, jobs)
        except subprocess.CalledProcessError as error:
            if library == CUDA:
                return "nvcc or CMake failed; `FT_CUDA=1 pip install -v` shows what they said"
            raise SystemExit(
                f"fasttrain: building the native CPU kernels failed: {error}\n"
                "The compiler's messages are above. FT_SKIP_NATIVE=1 installs without them."
            ) from error
        shutil.copy2(built, target)
        return None

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"  # no Python in it: any version loads it

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the libraries, or the notes, go into the source tree."""
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
    ext_modules=[
        Extension(f"fasttrain_kernels.{name}", sources=[], optional=True) for name in LIBRARIES
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
