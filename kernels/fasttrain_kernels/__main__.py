"""`python -m fasttrain_kernels`: which kernel serves each op on this machine, and why.

--check runs the self-tests, --bench times every op on a typical problem, --reset forgets both.
"""

import argparse
import sys
from typing import Any

import torch

from fasttrain_kernels import checks, native
from fasttrain_kernels.check import check
from fasttrain_kernels.dispatch import explain, reset
from fasttrain_kernels.fingerprint import installed_version
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
    parser.add_argument("--bench", action="store_true", help="time what has no times yet, first")
    parser.add_argument("--rows", type=int, default=4096, help="of the problems that --bench times")
    parser.add_argument("--reset", action="store_true", help="forget self-tests and times, first")
    arguments = parser.parse_args()
    print(machine())
    if arguments.reset:
        reset()
    asked: dict[str, Any] = {"device": arguments.device, "mode": arguments.mode}
    asked["dtype"] = getattr(torch, arguments.dtype)
    if arguments.bench:
        asked |= {"autotune": "full", "rows": arguments.rows}
    try:
        table(**asked)
    except ValueError as error:  # UnsupportedKernel, or a name that doesn't exist
        print(f"error: {error}", file=sys.stderr)
        return 2
    return self_tests(arguments.device) if arguments.check else 0


def machine() -> str:
    """One line on what the kernels would run on."""
    missing = native.why_not("_C_cpu")
    triton = installed_version("triton") or "not installed"
    cpu = missing or f"CPU kernels in {native.cpu_isa()}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"torch {torch.__version__}, triton {triton}; {cpu}; {gpu}"


def table(**asked: Any) -> None:
    """Prints a row per op, and below it a line per backend that was passed over."""
    where = f"{asked['device']}, {checks.short(asked['dtype'])}"
    print(f"\n{'op':24}{'backend':12}{'ms':>8}{'(eager)':>10}  why ({where})")
    for row in explain(**asked):
        print(
            f"{row.op:24}{row.backend:12}{_ms(row.milliseconds):>8}"
            f"{'(' + _ms(row.eager_milliseconds) + ')':>10}  {row.reason}"
        )
        for rejected in row.rejected:
            print(f"{'':24}{'  ' + rejected.backend:12}{'':20}not: {rejected.reason}")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def self_tests(device: str) -> int:
    """Prints a row per backend; 1 where one failed."""
    print(f"\n{'op':24}{'backend':12}self-test on {device}: worst error / allowed")
    rows = check(device=device)
    for row in rows:
        result = f"{row.parity:.2f}" if row.reason is None else row.reason
        failed = row.parity is not None and not row.passed
        print(f"{row.op:24}{row.backend:12}{result}{'  FAILED' if failed else ''}")
    return int(any(row.parity is not None and not row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
