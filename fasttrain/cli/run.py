"""`fasttrain run`"""

from __future__ import annotations

from collections.abc import Sequence

from fasttrain.cli.quiet import quiet_third_parties
from fasttrain.config.errors import Problem, UserError


def run(file: str, overrides: Sequence[str], *, dry_run: bool, nproc: int) -> int:
    """Train, and return the exit code. The config is checked before torch is imported."""
    from fasttrain.config.load import load

    refuse_processes(nproc)
    loaded = load(file, overrides)
    quiet_third_parties()
    from fasttrain.core import build

    return build.run(loaded, dry_run=dry_run).exit_code


def refuse_processes(nproc: int) -> None:
    """Several processes need an engine that this version does not have."""
    if nproc > 1:
        raise UserError(
            Problem(
                where="command line",
                key="--nproc",
                what=f"{nproc} processes need the distributed engine, which is not there yet.",
                hint="Leave --nproc out; CUDA_VISIBLE_DEVICES=0 chooses one of several GPUs.",
            )
        )
