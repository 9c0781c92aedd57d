"""The CPU library: what it links to, how it is built, and what is said where it is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fasttrain_kernels import choose, native

ROOT = Path(__file__).parents[2]
LIBRARY = native.HERE / "_C_cpu.so"


def symbols(*options):
    tool = shutil.which("nm")
    if tool is None or not LIBRARY.exists():
        pytest.skip("needs nm and a native library")
    listing = subprocess.run([tool, "-D", *options, LIBRARY], check=True, capture_output=True)
    return {line.split()[-1] for line in listing.stdout.decode().splitlines()}


def test_it_is_built_wherever_there_is_a_compiler():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert native.why_not("_C_cpu") is None
    assert native.cpu_isa() in ("generic", "avx2", "avx512")


def test_only_the_stable_abi_of_torch_is_used():
    torch_symbols = {s for s in symbols("--undefined-only") if re.search("torch|c10|at::|2at", s)}
    assert torch_symbols
    unstable = {s for s in torch_symbols if not re.fullmatch(r"(aoti_)?torch_\w+", s)}
    assert not unstable


def test_nothing_but_torch_and_the_standard_libraries_is_needed():
    others = {
        s
        for s in symbols("--undefined-only")
        if not re.search(r"torch_|@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(_ITM_|__gmon)", s)
    }
    assert not others


def test_it_exports_no_function_of_ours():
    assert not {s for s in symbols("--defined-only") if "fasttrain" in s}


def test_no_wide_instruction_outside_its_kernels():
    """What runs on every CPU must not contain AVX: not even in a shared inline function."""
    tool = shutil.which("objdump")
    if tool is None or not LIBRARY.exists() or native.why_not("_C_cpu") is not None:
        pytest.skip("needs objdump and a native library")
    listing = subprocess.run(
        [tool, "-d", "-C", "--no-show-raw-insn", LIBRARY],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    wide, function = set(), ""
    for line in listing.splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = heading[1]
        elif re.search(r"%[yz]mm\d", line):
            wide.add(function)
    if native.cpu_isa() != "generic":
        assert wide
    assert all(re.search(r"fasttrain::(avx2|avx512)::|^\.|^_init", name) for name in wide), wide


def test_an_unknown_instruction_set_is_refused():
    assert native.why_not("_C_cpu") is None
    with pytest.raises(RuntimeError):
        torch.ops.fasttrain_native.set_cpu_isa("sse9")


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (None, "_C_none.so is missing: this install did not build it"),
        (
            "the install found no C++ compiler",
            "_C_none.so is missing: the install found no C++ comp",
        ),
    ],
)
def test_a_missing_library_is_a_reason(tmp_path, monkeypatch, note, reason):
    monkeypatch.setattr(native, "HERE", tmp_path)
    if note is not None:
        (tmp_path / "_C_none.missing").write_text(note + "\n")
    native.why_not.cache_clear()
    assert native.why_not("_C_none").startswith(reason)
    native.why_not.cache_clear()


def test_a_broken_library_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "HERE", tmp_path)
    (tmp_path / "_C_broken.so").write_bytes(b"not a library")
    assert native.why_not("_C_broken").startswith("_C_broken.so does not load: ")


def test_the_table_says_why_there_is_no_native_kernel(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda library: f"{library}.so is missing: no compiler")
    row = choose("rms_norm", device="cpu", dtype=torch.float32, width=64)
    assert row.backend == "eager"
    reasons = {rejected.backend: rejected.reason for rejected in row.rejected}
    assert reasons["cpu"] == "_C_cpu.so is missing: no compiler"


def install(folder, **environment):
    """What `pip install` makes of the native part: the files beside the package."""
    subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            folder,
            "--build-temp",
            folder,
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    return sorted(path.name for path in (folder / "fasttrain_kernels").iterdir())


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")
def test_without_a_compiler_the_install_goes_on_and_says_so(tmp_path):
    missing = ["_C_cpu.missing", "_C_cuda.missing"]
    assert install(tmp_path / "a", FT_SKIP_NATIVE="1") == missing
    assert install(tmp_path / "b", CXX="no-such-compiler", FT_CUDA="auto") == missing
    said = (tmp_path / "b" / "fasttrain_kernels" / "_C_cpu.missing").read_text()
    assert said == (
        "the install found no C++ compiler (no-such-compiler); get it, then install again\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_library_builds_from_a_checkout(tmp_path):
    """With pip's CMake and Ninja, even where the system has others, such as too old ones.

    And with an nvcc that fails, which costs the CUDA library only.
    """
    pytest.importorskip("cmake")
    pytest.importorskip("ninja")
    (tmp_path / "bin").mkdir()
    for tool in ("cmake", "ninja", "bin/nvcc"):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    built = install(tmp_path / "built", PATH=path, CUDA_HOME=str(tmp_path), FT_CUDA="auto")
    assert built == ["_C_cpu.so", "_C_cuda.missing"]
    said = (tmp_path / "built" / "fasttrain_kernels" / "_C_cuda.missing").read_text()
    assert said.startswith("nvcc or CMake failed")
