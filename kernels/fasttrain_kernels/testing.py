"""How kernels are proven: exact values with the error that is allowed, traps, the GPU compile gate.

Every tolerance of the project lives here (those of the losses in testing_losses.py), and is
derived: a result may be off by the roundings that its definition makes, each at most `ROUNDOFF` of
the value rounded, and by what the arithmetic loses on the way, which for a sum of n terms grows
like sqrt(n). Errors are compared element by element with a limit of their own, so that no norm
hides a wrong row. `Expected.ratio` is the error in units of the limit: right is at most 1.
"""

import ctypes
import math
import mmap
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The largest relative error of rounding to nearest: half a unit in the last place.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


@dataclass(frozen=True)
class Expected:
    """An exact value, and how far from it a result may be; both float64, of one shape."""

    value: Tensor
    limit: Tensor

    def ratio(self, actual: Tensor) -> float:
        """The worst error of `actual` in units of the limit; infinite where not finite."""
        assert actual.shape == self.value.shape, (actual.shape, self.value.shape)
        if actual.numel() == 0:
            return 0.0
        error = (actual.detach().double().cpu() - self.value).abs()
        ratio = torch.where(error == 0, 0.0, error / self.limit)
        return float(ratio.nan_to_num(nan=math.inf, posinf=math.inf).max())


def rms_norm_expected(
    s: Tensor,
    weight: Tensor,
    eps: float,
    style: str,
    *,
    dy: Tensor,
    dsum: Tensor | None = None,
    output_dtype: torch.dtype,
    truncating: bool = False,
) -> dict[str, Expected]:
    """y, dx and dweight of rms_norm of the rows s (N, H), as stored (after the residual is added).

    `truncating`: the backend rounds bfloat16 towards zero, as Triton's interpreter does.
    """
    wide = torch.float64
    low = {dtype: ROUNDOFF[dtype] * (2 if truncating else 1) for dtype in ROUNDOFF}
    rows, width = s.shape
    compute = ROUNDOFF[torch.float64 if s.dtype == wide else torch.float32]
    arithmetic = compute * (8 + math.sqrt(width))
    stored_y = low[output_dtype] + (low[s.dtype] if style == "llama" else 0.0)

    x, w, g = (t.detach().cpu().to(wide) for t in (s, weight, dy))
    beside = torch.zeros_like(x) if dsum is None else dsum.detach().cpu().to(wide)
    offset = 1.0 if style == "gemma" else 0.0
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    n = x * rstd
    y = n * (w + offset)
    grad = g * (w + offset)
    dx = rstd * (grad - n * (grad * n).mean(-1, keepdim=True)) + beside
    dweight = (g * n).sum(0)

    grad_size = g.abs() * (w.abs() + offset)
    dx_size = rstd * (grad_size + n.abs() * (grad_size * n.abs()).mean(-1, keepdim=True))
    share = (g * n).abs().sum(0)
    return {
        "y": Expected(y, stored_y * y.abs() + arithmetic * n.abs() * (w.abs() + offset)),
        "dx": Expected(dx, low[s.dtype] * dx.abs() + arithmetic * (dx_size + beside.abs())),
        "dweight": Expected(
            dweight, low[weight.dtype] * dweight.abs() + (arithmetic + compute * rows**0.5) * share
        ),
    }


# ---- traps: memory that makes a wrong read or a missing write visible ----------------------------


@contextmanager
def guarded(tensor: Tensor) -> Iterator[Tensor]:
    """A contiguous copy on the CPU that ends where memory ends: one element further is SIGSEGV."""
    size = max(1, tensor.numel() * tensor.element_size())
    page = mmap.PAGESIZE
    pages = -(-size // page)
    region = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(start + pages * page)
    if libc.mprotect(guard, ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    try:
        memory = (ctypes.c_char * size).from_address(start + pages * page - size)
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel())
        yield copy.view(tensor.shape).copy_(tensor)
    finally:
        libc.mprotect(guard, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


@contextmanager
def sparse_rows(rows: int, width: int, stride: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """(rows, width) of zeros on the CPU, rows `stride` elements apart, however many GB that spans.

    Only pages that are touched take memory.
    """
    size = ((rows - 1) * stride + width) * dtype.itemsize
    no_reserve = 0x4000  # MAP_NORESERVE on Linux; Python 3.11's mmap doesn't name it
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    memory = torch.frombuffer(region, dtype=dtype)
    yield memory.as_strided((rows, width), (stride, 1))


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """New tensors come filled with NaN, so that an element which no kernel writes is seen.

    That is what torch does in deterministic mode, unless told otherwise.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ---- the gate for GPU kernels on machines without a GPU -----------------------------------------

ARCHITECTURES = (80, 90, 100, 120)  # A100, H100 and H200, B200, RTX 50
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # per program
REGISTERS = 65536  # per multiprocessor, on all of them


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes."""

    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers
    shared: int  # bytes
    ptx: str = field(repr=False)

    def programs_per_multiprocessor(self, warps: int) -> int:
        """How many programs run at once, as far as registers allow."""
        return REGISTERS // (self.registers * 32 * warps)


def compile_for_gpu(
    kernel: Any,
    arguments: Mapping[str, Any],
    architecture: int,
    *,
    warps: int,
    stages: int | None = None,
    round_sizes: bool = True,
    fp_fusion: bool = True,
) -> Resources:
    """Compiles a Triton kernel to machine code, as a launch on such a GPU would; needs no GPU.

    `arguments` has an entry per parameter: a Triton type ("*bf16", "i32", "fp32") for what is
    passed at run time, any other value for a constexpr, a pointer that is None, or an integer that
    is 1, for which Triton compiles anew. Pointers are taken to be divisible by 16; so are integers,
    as for the shapes that models have, unless `round_sizes` is False.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = re.compile(r"\*?(bf16|fp16|fp32|fp64|i32|i64)")
    signature = {
        name: value if isinstance(value, str) and types.fullmatch(value) else "constexpr"
        for name, value in arguments.items()
    }
    constants = {name: arguments[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind[0] == "*" or (kind[0] == "i" and round_sizes)
    }
    options = {"num_warps": warps, "enable_fp_fusion": fp_fusion}
    if stages is not None:
        options["num_stages"] = stages
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    registers, stack = _resource_usage(compiled.asm["cubin"])
    return Resources(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])
