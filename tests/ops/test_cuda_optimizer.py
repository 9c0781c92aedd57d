"""The CUDA kernels of optimizer steps and of the gradient norm, on a machine without a GPU.

What a thread does (csrc/cuda/optimizer_lane.h) is compiled for the host, a warp's threads one after
the other, and makes the same steps as the CPU's kernel, to the last bit. Roots and quotients are
exact here: how far a GPU's own are off is for tests on a GPU.
"""

import copy
import ctypes
import math
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fasttrain_kernels import native
from fasttrain_kernels.ops.grad_norm import cuda_kernel as cuda_norm
from fasttrain_kernels.ops.grad_norm.reference import Problem as NormProblem
from fasttrain_kernels.ops.optimizer_step import codes, cpu_kernel, cuda_kernel, native_step
from fasttrain_kernels.ops.optimizer_step.reference import Problem
from fasttrain_kernels.ops.optimizer_step.table import Table
from fasttrain_kernels.testing_optimizer import (
    OFFSETS,
    SIZES,
    changed_by_skipping,
    norm_expected,
    parity_of,
    problems,
    random_step,
)

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, BF16 = torch.float32, torch.bfloat16

pytestmark = pytest.mark.skipif(
    native.why_not("_C_cpu") is not None, reason=f"{native.why_not('_C_cpu')}"
)
# Elsewhere the compiler fuses products and sums for the plainest CPU too.
on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="bits are compared on x86"
)


def address(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


class Host:
    """The kernels on the host, as a backend of optimizer_step and of grad_norm."""

    def __init__(self, library):
        self.library = library
        library.run_norm.restype = library.run_codes.restype = ctypes.c_float
        library.run_power.restype = ctypes.c_double

    def unsupported(self, problem):
        return native_step.why_not(problem)

    def step(self, work):
        table = work.table.of(work.slots)
        kinds = (
            native_step.ALGORITHMS[work.algorithm],
            native_step.ROUNDINGS[work.rounding],
            native_step.MOMENTS[work.moments],
        )
        self.library.run_step(
            *(address(table), ctypes.c_int64(len(table)), address(work.numbers)),
            *map(ctypes.c_int64, kinds),
            *(address(work.norm), ctypes.c_double(work.max_norm), address(work.grad_scale)),
            *(address(work.skip), ctypes.c_int64(work.seed), ctypes.c_bool(work.zero_grad)),
        )
        assert self.library.run_misaligned() == 0

    def norm(self, gradients, table):
        rows = table.of_gradients(gradients)
        return torch.tensor(self.library.run_norm(address(rows), ctypes.c_int64(len(rows))))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "optimizer.so"
    source = Path(__file__).with_name("cuda_optimizer_on_host.cpp")
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-I", ROOT / "csrc/cuda"]
    subprocess.run([compiler, *flags, source, "-o", library], check=True)
    return Host(ctypes.CDLL(str(library)))


@pytest.fixture
def plain_cpu():
    """The CPU's kernel without fused products and without estimates."""
    torch.ops.fasttrain_native.set_cpu_isa("generic")
    yield cpu_kernel
    torch.ops.fasttrain_native.set_cpu_isa("auto")


EVERY = problems(cpu_kernel, CPU) if native.why_not("_C_cpu") is None else []


def param(value):
    return "-".join(str(part).removeprefix("torch.") for part in value[1:-1])


def misaligned(tensor, by):
    """The same values, `by` elements after an address that is a multiple of 64 bytes."""
    room = tensor.new_empty(tensor.numel() + by)
    room[by:] = tensor
    return room[by:]


def tensors(slot):
    return [value for value in vars(slot).values() if isinstance(value, torch.Tensor)]


def assert_same_bits(one, other):
    """But for NaN, which has many bits, and for the codes of a moment that is."""
    for mine, theirs in zip(one.slots, other.slots, strict=True):
        for a, b in zip(tensors(mine), tensors(theirs), strict=True):
            if a.is_floating_point():
                assert torch.equal(a.isnan(), b.isnan())
                a, b = a.nan_to_num(0), b.nan_to_num(0)
            else:
                a, b = (codes[~mine.param.isnan()] for codes in (a, b))
            assert torch.equal(a, b)


def stepped_alike(host, plain_cpu, work):
    other = replace(work, slots=copy.deepcopy(work.slots), table=Table())
    host.step(work)
    plain_cpu.step(other)
    assert_same_bits(work, other)


@on_x86
@pytest.mark.parametrize("problem", EVERY, ids=param)
def test_steps_are_the_cpus_to_the_last_bit(host, plain_cpu, problem):
    # From within a block on, far beyond 2^32 elements and across a multiple of it, and elsewhere.
    offsets = (*OFFSETS, 3 * 2**32 - 200, 111)
    stepped_alike(host, plain_cpu, random_step(problem, (*SIZES, 1000, 300), offsets=offsets))
    for name in ("grad", "param", "beside", "first", "second"):
        work = random_step(problem, (700, 0, 513), offsets=(0, 256, 8), max_norm=0)
        for slot in work.slots:
            if (tensor := getattr(slot, name)) is not None:
                setattr(slot, name, misaligned(tensor, 1))
        stepped_alike(host, plain_cpu, replace(work, zero_grad=True))
        assert all(not slot.grad.any() for slot in work.slots)


@on_x86
@pytest.mark.parametrize("problem", EVERY, ids=param)
def test_extremes_are_the_cpus_to_the_last_bit(host, plain_cpu, problem):
    extremes = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1e-20, 1e18, 1e38, math.inf, math.nan])
    work = random_step(problem, (9 * 256, 300))
    values = extremes.repeat_interleave(256)
    for slot in work.slots:
        # A block each, and in the second slot all in one.
        some = values if len(slot.grad) == len(values) else extremes.repeat(34)[:300]
        slot.grad.copy_(some)
        slot.grad[::2] *= -1
        slot.param.copy_(some.roll(1))
    stepped_alike(host, plain_cpu, work)
    stepped_alike(host, plain_cpu, replace(work, grad_scale=None, norm=None))


def test_steps_are_exact_to_their_roundings(host):
    for problem in EVERY:
        assert parity_of(host, random_step(problem, (1, 300), offsets=(0, 100))) <= 1, problem
    assert not changed_by_skipping(host, random_step(EVERY[0], (5, 700)))


def test_norms(host):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator) for size in (0, 1, 1051, 2 * 64 * 256 + 77)]
    for dtype in (F32, BF16):
        gradients = [t.clone().to(dtype) for t in drawn]
        gradients[1] = gradients[1].float()
        gradients[2] = misaligned(gradients[2], 1)
        for scale in (1.0, 1e-15, 1e15):
            scaled = [t.mul_(scale) for t in copy.deepcopy(gradients)]
            assert norm_expected(scaled).ratio(host.norm(scaled, Table())) <= 1
        gradients[3][40] = 1e25  # whose square is beyond float32
        assert norm_expected(gradients).ratio(host.norm(gradients, Table())) <= 1
        for bad in (math.inf, math.nan):
            gradients[3][7] = bad
            assert not host.norm(gradients, Table()).isfinite()


def test_codes_are_the_references(host):
    generator = torch.Generator().manual_seed(0)
    count = 4 * codes.BLOCK
    random = torch.randint(0, 1 << 16, (count,), generator=generator)
    narrow = random.int()
    # Largest values at, below and above what the next power of two begins at; and extreme ones.
    edges = [1.0, 0.875, 0.8749, 0.9375, 0.9376, 1.75, 2.0**-126, 1e-38, 1e-45, 0.0, 3e38]
    for largest in edges:
        values = torch.rand(count, generator=generator).pow(8) * largest
        values[:: codes.BLOCK] = largest
        scales = codes.scale_of(values, 0)
        for signed in (values, -values):
            roots, firsts = torch.empty(2, count, dtype=torch.uint8)
            scale = host.library.run_codes(
                *(ctypes.c_float(values[0]), address(signed), address(narrow)),
                *(ctypes.c_int64(count), address(roots), address(firsts)),
            )
            assert scales.tolist() == [scale] * 4
            assert torch.equal(firsts, codes.first_codes(signed, scales, 0, random))
            if signed is values:
                assert torch.equal(roots, codes.root_codes(signed, scales, 0, random))


def test_powers(host):
    for base in (0.0, 0.9, 0.999, 1 - 1e-7):
        for steps in (1, 2, 3, 1000, 123456, 2**24):
            found = host.library.run_power(ctypes.c_double(base), ctypes.c_double(steps))
            assert abs(found - base**steps) <= 1e-9 * base**steps


def test_it_says_what_it_does_not_serve():
    problem = Problem(CUDA, BF16, BF16, "adamw", "master", "float32")
    assert "are on cpu" in cuda_kernel.unsupported(problem._replace(device=CPU))
    assert cuda_kernel.unsupported(problem._replace(dtype=F32)).startswith("serves bfloat16")
    assert "are on cpu" in cuda_norm.unsupported(NormProblem(CPU, F32))
    assert cuda_norm.unsupported(NormProblem(CUDA, torch.float64)).startswith("serves float32")
    if torch.version.cuda is None:
        reason = native.why_not("_C_cuda")
        assert cuda_kernel.unsupported(problem) == reason
        assert cuda_norm.unsupported(NormProblem(CUDA, F32)) == reason
