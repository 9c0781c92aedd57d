"""Runs self-tests because somebody asked, whatever is on record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fasttrain_kernels.proof import first_line, full_parity, limit
from fasttrain_kernels.registry import OPS, Candidate, find
from fasttrain_kernels.selection import advice, why_not

if TYPE_CHECKING:
    from fasttrain_kernels.dispatch import Op


@dataclass(frozen=True)
class Checked:
    """What a backend's self-test on a device found."""

    op: str
    backend: str
    parity: float | None  # worst error in units of what is allowed; None: not run
    reason: str | None  # why it was not run, or how it failed
    limit: float = 1.0  # what it may be

    @property
    def passed(self) -> bool:
        return self.parity is not None and self.parity <= self.limit


def check(
    op: str | None = None, backend: str | None = None, *, device: str | torch.device = "cpu"
) -> tuple[Checked, ...]:
    """Runs the self-test of every backend that is made for `device`, of `op` or of every op.

    Forward and backward on small fixed problems against exact values: under a second on a CPU,
    longer where Triton has to compile first. Backends that advise against themselves, for they
    compile for long, are tested by name only. A failed test is a row whose `passed` is False, not
    an exception; `fasttrain_kernels.quarantine` is what keeps such a backend from being used.
    """
    device = torch.device(device)
    return tuple(
        _checked(find(name), candidate, device, named=backend is not None)
        for name in (sorted(OPS) if op is None else [op])
        for candidate in find(name).candidates
        if candidate.made_for(device.type) and backend in (None, candidate.name)
    )


def _checked(op: Op, candidate: Candidate, device: torch.device, named: bool) -> Checked:
    problem = op.describe(device=device, dtype=torch.float32, **op.example)
    reason = why_not(op, candidate, problem)
    if reason is None and not named:
        reason = advice(candidate, problem)
    if reason is not None:
        return Checked(op.name, candidate.name, None, reason)
    try:
        parity = full_parity(op.self_test, candidate.module, device)
        return Checked(op.name, candidate.name, parity, None, limit(candidate))
    except Exception as error:  # whatever it is, it is what was asked for
        return Checked(op.name, candidate.name, math.inf, first_line(error))
