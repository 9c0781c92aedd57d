"""Which kernel serves which site of the model, and why."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

AUTO, EAGER = "auto", "eager"
PREFER = "auto:"  # before a backend's name: that one first, another where it fails
OPTIMIZER = "optimizer"  # the path of what is no module: the ops of the optimizer's step
WRAPPER = "causal_lm."  # what stands before a module's own name in a model of ours


@dataclass(frozen=True)
class KernelSite:
    """One module of the model, and what serves it. `backend` "eager" leaves it untouched."""

    path: str  # the module's name, such as causal_lm.model.layers.0.input_layernorm
    op: str
    backend: str
    reason: str = ""
    rejected: tuple[tuple[str, str], ...] = ()  # (backend, why)
    parity: float | None = None  # worst error of the self-test, in units of what is allowed
    milliseconds: float | None = None  # forward and backward, on the run's sizes
    eager_milliseconds: float | None = None  # the same of the model's own code
    fixed: bool = False  # nothing else may take over where it fails

    @property
    def requested(self) -> str:
        """What whoever calls the op asks of it."""
        return self.backend if self.fixed or self.backend == EAGER else PREFER + self.backend

    def matches(self, pattern: str) -> bool:
        """Whether a glob such as `model.layers.0.*` fits its name. `*` crosses dots."""
        return fits(self.path, pattern)


@dataclass(frozen=True)
class KernelRow:
    """One line of the kernel table."""

    op: str
    sites_matched: int
    sites_found: int
    chosen: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    parity: float | None = None
    milliseconds: float | None = None
    eager_milliseconds: float | None = None


@dataclass(frozen=True)
class KernelPlan:
    """Which kernel serves which site: decided once, applied by the kernels transform.

    `others` are rows of what has no site: an op that the model has no use for, modules that look
    like sites and are none. `ops` is the order of the table; what isn't in it comes after.
    """

    sites: tuple[KernelSite, ...] = ()
    others: tuple[KernelRow, ...] = ()
    ops: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[KernelRow, ...]:
        """The table: a row for the sites that were decided alike, op by op."""
        groups: dict[KernelSite, int] = defaultdict(int)
        found: dict[str, int] = defaultdict(int)
        for site in self.sites:
            groups[replace(site, path="", fixed=False)] += 1
            found[site.op] += 1
        rows = [_row(alike, count, found[alike.op]) for alike, count in groups.items()]
        rows += self.others
        order = list(dict.fromkeys((*self.ops, *(row.op for row in rows))))
        return tuple(sorted(rows, key=lambda row: order.index(row.op)))

    def of_optimizer(self, op: str) -> str:
        """What the optimizer asks of one of its ops: "auto" where nobody has chosen."""
        sites = (site for site in self.sites if site.op == op and site.path == OPTIMIZER)
        return next((site.requested for site in sites), AUTO)

    def leaving(self, op: str, pattern: str, reason: str) -> KernelPlan:
        """The plan with the sites of `op` whose names fit the glob left as the model has them.

        ValueError where there is none.
        """

        def left(site: KernelSite) -> bool:
            return site.op == op and site.matches(pattern)

        if not any(map(left, self.sites)):
            raise ValueError(f"no site of {op} fits {pattern!r}")
        sites = (KernelSite(s.path, op, EAGER, reason) if left(s) else s for s in self.sites)
        return replace(self, sites=tuple(sites))


def fits(path: str, pattern: str) -> bool:
    """Whether a glob fits a module's name, with or without the wrapper's before it."""
    return fnmatchcase(path, pattern) or fnmatchcase(path.removeprefix(WRAPPER), pattern)


def _row(alike: KernelSite, matched: int, found: int) -> KernelRow:
    return KernelRow(
        alike.op,
        matched,
        found,
        alike.backend,
        alike.reason,
        alike.rejected,
        alike.parity,
        alike.milliseconds,
        alike.eager_milliseconds,
    )
