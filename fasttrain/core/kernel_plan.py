"""Which kernel serves which site of the model, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSite:
    """One module of the model, and what serves it. `backend` "eager" leaves it untouched."""

    path: str  # the module's name, such as model.layers.0.input_layernorm
    op: str
    backend: str


@dataclass(frozen=True)
class KernelRow:
    """One line of the kernel table."""

    op: str
    sites_matched: int
    sites_found: int
    chosen: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()  # (backend, why)
    parity: float | None = None  # relative error of the self-test
    milliseconds: float | None = None


@dataclass(frozen=True)
class KernelPlan:
    """Which kernel serves which site, and why: decided once, applied by the kernels transform."""

    sites: tuple[KernelSite, ...] = ()
    rows: tuple[KernelRow, ...] = ()
