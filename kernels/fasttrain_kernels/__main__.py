"""`python -m fasttrain_kernels [--check]`: which kernel serves each op on this machine, and why."""

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from fasttrain_kernels import checks, native
from fasttrain_kernels.check import check
from fasttrain_kernels.dispatch import explain
from fasttrain_kernels.settings import MODES


def main() -> int:
    """Prints the table; 1 where a self-test failed, 2 where what was asked for can't be."""
    parser = argparse.ArgumentParser(prog="python -m fasttrain_kernels", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=[checks.short(d) for d in checks.FLOATS]
    )
    parser.add_argument("--mode", default="auto", choices=MODES)
    parser.add_argument("--check", action="store_true", help="also run the self-tests")
    arguments = parser.parse_args()
    print(machine())
    try:
        table(arguments.device, getattr(torch, arguments.dtype), arguments.mode)
    except ValueError as error:  # UnsupportedKernel, or a name that doesn't exist
        print(f"error: {error}", file=sys.stderr)
        return 2
    return self_tests(arguments.device) if arguments.check else 0


def machine() -> str:
    """One line on what the kernels would run on."""
    missing = native.why_not("_C_cpu")
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    cpu = missing or f"CPU kernels in {native.cpu_isa()}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"torch {torch.__version__}, triton {triton}; {cpu}; {gpu}"


def table(device: str, dtype: torch.dtype, mode: str) -> None:
    """Prints a row per op, and below it a line per backend that was passed over."""
    print(f"\n{'op':24}{'backend':12}why ({device}, {checks.short(dtype)})")
    for row in explain(device=device, dtype=dtype, mode=mode):
        print(f"{row.op:24}{row.backend:12}{row.reason}")
        for rejected in row.rejected:
            print(f"{'':24}{'  ' + rejected.backend:12}not: {rejected.reason}")


def self_tests(device: str) -> int:
    """Prints a row per backend; 1 where one failed."""
    print(f"\n{'op':24}{'backend':12}self-test on {device}: worst error / allowed")
    rows = check(device=device)
    for row in rows:
        result = f"not run: {row.reason}" if row.parity is None else f"{row.parity:.2f}"
        failed = row.parity is not None and not row.passed
        print(f"{row.op:24}{row.backend:12}{result}{'  FAILED' if failed else ''}")
    return int(any(row.parity is not None and not row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
