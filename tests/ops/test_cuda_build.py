"""The CUDA library, on a machine without a GPU: its machine code, its symbols, its arithmetic.

The arithmetic runs on the host: csrc/cuda/cross_entropy_math.h is what those kernels are made of.
That of optimizers is in test_cuda_optimizer.py.
"""

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fasttrain_kernels import native
from fasttrain_kernels.ops.cross_entropy import cuda_kernel, reference
from fasttrain_kernels.ops.cross_entropy.reference import IGNORED, INVALID, Problem, Terms
from fasttrain_kernels.testing import ARCHITECTURES, ROUNDOFF

ROOT = Path(__file__).parents[2]
LIBRARY = native.HERE / "_C_cuda.so"
NOTE = native.HERE / "_C_cuda.missing"

SAID = NOTE.read_text() if NOTE.exists() else "run `make setup`"

needs_library = pytest.mark.skipif(
    not LIBRARY.exists() and (shutil.which("nvcc") is None or "the install was told" in SAID),
    reason="no nvcc, or the install was told to do without the CUDA library",
)


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cuobjdump(*options):
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return output_of(tool, *options, LIBRARY)


# ---- the library ---------------------------------------------------------------------------------


@needs_library
def test_it_is_built_wherever_there_is_nvcc():
    assert LIBRARY.exists(), SAID


@needs_library
def test_it_holds_code_for_every_architecture_and_for_later_ones():
    listing = cuobjdump("-lelf", "-lptx")
    assert set(re.findall(r"\.sm_(\d+\w?)\.cubin", listing)) == set(map(str, ARCHITECTURES))
    assert set(re.findall(r"\.sm_(\d+\w?)\.ptx", listing)) == {str(max(ARCHITECTURES))}


@needs_library
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_and_two_blocks_fit(architecture):
    report = cuobjdump("-res-usage", "-arch", f"sm_{architecture}")
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    kernels = {name: tuple(map(int, numbers)) for name, *numbers in found}
    for kind in (r"\dforward_backward_kernel", r"\dbackward_kernel", r"\dforward_kernel"):
        # Three types of logits, with a softcap and without.
        assert sum(re.search(kind, name) is not None for name in kernels) == 6, kind
    # Three algorithms, four roundings, three kinds of moments, and sgd without any; and the norm.
    assert sum("step_kernel" in name for name in kernels) == 3 * 4 * 3 + 4
    assert sum("norm_kernel" in name for name in kernels) == 1
    for name, (registers, stack, shared, local) in kernels.items():
        assert stack == local == 0, name
        if re.search("step_kernel|norm_kernel", name):
            # 96: five blocks of 128 threads, as optimizer.cu has it; all else lies in registers.
            assert registers <= 96 and shared <= 2048, name
            continue
        # 64: two blocks of 512 threads, or one of 1024, on a multiprocessor.
        assert registers <= 64, name
        # What plan() in cross_entropy.cu sets aside, with the 1 KB that the system takes: from
        # 9.0 on that is part of the figure.
        assert shared + (1024 if architecture < 90 else 0) <= 2048, name


@needs_library
def test_only_the_stable_abi_of_torch_is_used():
    listing = output_of(shutil.which("nm") or pytest.skip("needs nm"), "-D", LIBRARY)
    symbols = {line.split()[-1]: line.split()[-2] for line in listing.splitlines()}
    undefined = {name for name, kind in symbols.items() if kind == "U"}
    of_torch = {name for name in undefined if re.search("torch|c10|at::|2at", name)}
    assert {name for name in of_torch if not re.fullmatch(r"(aoti_)?torch_\w+", name)} == set()
    # The one that libtorch_cpu.so has not: where torch has no CUDA, nothing else may be wanting.
    assert {name for name in of_torch if "cuda" in name} == {"aoti_torch_get_current_cuda_stream"}
    # Neither is the CUDA runtime taken from outside, nor is ours offered to others.
    assert not {name for name in symbols if re.match(r"(__)?cuda|cu[A-Z]|.*fasttrain", name)}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_a_reason():
    reason = native.why_not("_C_cuda")
    assert reason == f"this torch ({torch.__version__}) has no CUDA"
    device = torch.device("cuda")
    assert cuda_kernel.unsupported(Problem(device, torch.bfloat16, 32000)) == reason
    assert cuda_kernel.unsupported(Problem(device, torch.float64, 32000)).startswith("serves float")
    assert "are on cpu" in cuda_kernel.unsupported(
        Problem(torch.device("cpu"), torch.float32, 32000)
    )
    if LIBRARY.exists():
        with pytest.raises(OSError):
            torch.ops.load_library(LIBRARY)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")
def test_an_install_that_demands_it_fails_without_it(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", tmp_path, "--build-temp", tmp_path]
    environment = {**os.environ, "FT_CUDA": "1", "CXX": "no-such-compiler"}
    install = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert install.returncode != 0
    assert "no _C_cuda.so, which FT_CUDA=1 demands: the install found no C++" in install.stderr


# ---- the arithmetic ------------------------------------------------------------------------------

# A row as a block takes it: vectors of 8 dealt out to threads, whose sums are then merged.
PROGRAM = r"""
#include "cross_entropy_math.h"
using namespace fasttrain;

template <bool kSoftcap>
void row(const float* logits, int width, int label, float coefficient, const Terms& terms,
         float* statistics, float* out) {
  constexpr int kThreads = 5, kLanes = 8;
  Sums sums, of_thread[kThreads];
  for (int start = 0; start < width; start += kLanes) {
    float z[kLanes];
    for (int i = 0; i < kLanes; ++i) z[i] = capped<kSoftcap>(logits[start + i], terms).z;
    add(of_thread[start / kLanes % kThreads], z, true, true);
  }
  for (const Sums& other : of_thread) sums = merged(sums, other);
  statistics[0] = sums.maximum;
  statistics[1] = sums.sum;
  statistics[2] = label < 0 ? 0.0f : capped<kSoftcap>(logits[label], terms).z;
  statistics[3] = sums.total;
  statistics[4] = sums.weighted;
  const RowGradient shared = row_gradient(sums.maximum, sums.sum, coefficient, terms);
  for (int i = 0; i < width; ++i) {
    const Capped value = capped<kSoftcap>(logits[i], terms);
    out[i] = i == label ? label_gradient(value, shared, terms) : gradient(value, shared);
  }
}

extern "C" void run(const float* logits, int width, int label, float coefficient, double scale,
                    double softcap, double smoothing, double z_loss, float* statistics,
                    float* out) {
  const Terms terms = terms_of(scale, softcap, smoothing, z_loss, width);
  const auto chosen = softcap == 0 ? row<false> : row<true>;
  chosen(logits, width, label, coefficient, terms, statistics, out);
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The program above as a function of tensors: the statistics and the gradient of all rows."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-I", ROOT / "csrc/cuda"]
    subprocess.run([compiler, *flags, folder / "host.cpp", "-o", folder / "host.so"], check=True)
    library = ctypes.CDLL(str(folder / "host.so"))

    def run(logits, targets, terms, coefficients):
        statistics, gradient = torch.empty(len(logits), 5), torch.empty_like(logits)
        numbers = (terms.scale, terms.softcap or 0.0, terms.label_smoothing, terms.z_loss)
        for row in range(len(logits)):
            library.run(
                *(ctypes.c_void_p(logits[row].data_ptr()), logits.shape[1], int(targets[row])),
                *(ctypes.c_float(coefficients[row]), *map(ctypes.c_double, numbers)),
                ctypes.c_void_p(statistics[row].data_ptr()),
                ctypes.c_void_p(gradient[row].data_ptr()),
            )
        return statistics, gradient

    return run


def assert_near(actual, expected, size):
    """Within the roundings of sums of a thousand terms (as in testing.py), of numbers of `size`."""
    actual, limit = actual.double(), ROUNDOFF[torch.float32] * (8 + math.sqrt(1000)) * size
    assert torch.equal(actual.isnan(), expected.isnan())
    wrong = ((actual - expected).abs() > limit) & (actual != expected)
    assert not (wrong & ~expected.isnan()).any(), (actual[wrong], expected[wrong])


def special_rows(width):
    logits = torch.randn(9, width, generator=torch.Generator().manual_seed(1)) * 4
    logits[1] = -math.inf
    logits[2, : width // 2] = -math.inf
    logits[3, 7] = math.nan
    logits[4] = logits[4].sign() * 1e4
    logits[5, 11] = 1e4  # p of the label is 1
    logits[6, 3] = math.inf
    return logits, torch.tensor([0, 5, width - 1, 7, 9, 11, 3, IGNORED, INVALID])


@pytest.mark.parametrize(
    "terms",
    [
        Terms(),
        Terms(scale=0.3),
        Terms(softcap=30.0),
        Terms(label_smoothing=0.1),
        Terms(z_loss=1e-3),
        Terms(1.7, 5.0, 0.1, 1e-3),
    ],
    ids=["plain", "scale", "softcap", "smoothing", "z-loss", "all"],
)
def test_arithmetic_of_the_kernels(host, terms):
    logits, targets = special_rows(1000)
    coefficients = torch.linspace(0.1, 2.0, len(logits))
    coefficients[-1] = math.nan
    statistics, gradient = host(logits, targets, terms, coefficients)
    exact = torch.zeros(len(logits), 5, dtype=torch.float64)
    wide = logits.double()
    all_wanted = terms._replace(label_smoothing=terms.label_smoothing or 1e-30)
    reference.forward(wide, targets, all_wanted, exact, wants_entropy=True)
    z = reference.capped(wide, terms).nan_to_num(0, 0, 0).abs()
    largest = z.amax(1)
    rounded_z = 1 + largest * (terms != Terms())  # nothing is rounded in z = a, nor a - max a here
    sums = exact.nan_to_num(0, 0, 0).abs()
    sizes = torch.stack([largest, sums[:, 1] * rounded_z, largest, z.sum(1), z.sum(1)], 1)
    sizes[:, 4] += sums[:, 4] * rounded_z
    assert_near(statistics, exact, sizes)
    expected = torch.empty_like(wide)
    reference.backward(wide, targets, terms, exact, coefficients.double(), expected, 0, 1000)
    live = targets != IGNORED  # the kernels write zeros there and compute nothing
    p = torch.softmax(reference.capped(wide, terms), 1).nan_to_num(0)
    p = p * (1 + 2 * terms.z_loss * (largest + math.log(1000)))[:, None] * rounded_z[:, None]
    p += torch.nn.functional.one_hot(targets.clamp(0), 1000) + terms.label_smoothing / 1000
    assert_near(gradient[live], expected[live], (p * 2 * terms.scale * rounded_z[:, None])[live])
