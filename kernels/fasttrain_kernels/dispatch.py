"""Chooses which backend serves a call. Nothing else in the package chooses, or reads a setting.

A call is described by a *problem*, a hashable tuple of facts (device, dtypes, widths; never data).
The choice follows from the problem and from what was asked:

1. What was asked: `use()` goes before the environment, `FASTTRAIN_KERNELS="mode=strict,
   rms_norm=triton"`, which goes before the caller's own `backend=` and `mode=`, which go before
   "auto". Mode "eager" is the reference for every op not named at a higher level. (`checked=true`,
   in either, chooses nothing: it has labels looked at on a GPU.)
2. A backend asked for by name is taken, or the call fails with the reason.
3. "auto" takes the first candidate that is made for the device and has no reason against it. One
   that can serve may still advise against itself (`advice(problem)`), where another is known to be
   faster; by name it is taken all the same. In mode "strict", "auto" takes the very first that
   doesn't, or fails.
4. "eager", the reference, is last and always legal.

`Op.select` is the hot path: a dictionary look-up. `choose` and `explain` are for people, and for
a trainer that plans its model: they say why.
"""

import functools
import importlib
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

ENVIRONMENT = "FASTTRAIN_KERNELS"
AUTO = "auto"
EAGER = "eager"
CALLER = "backend="
MODES = ("auto", "eager", "strict")


class UnsupportedKernel(ValueError):  # noqa: N818  (a public name, fixed by the design)
    """A backend was asked for, by name or by mode "strict", and can't serve the call."""


@dataclass(frozen=True)
class Rejection:
    """One backend that was not chosen, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """One row of the kernel table."""

    op: str
    backend: str
    reason: str
    rejected: tuple[Rejection, ...] = ()
    parity: float | None = None  # worst error against the reference, in units of what is allowed
    milliseconds: float | None = None  # forward and backward, on the problem that was timed


@dataclass(frozen=True)
class Candidate:
    """A backend of an op: the module that implements it, and the device types it is made for."""

    name: str
    module: str
    devices: tuple[str, ...]  # empty: any

    def made_for(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices

    def load(self) -> ModuleType | str:
        """The module, or the reason why it can't be imported. Asked once per process."""
        return _load(self.module)


@functools.cache
def _load(module: str) -> ModuleType | str:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return f"cannot be imported: {error}"


@dataclass(frozen=True)
class Settings:
    """What one level (a `use()`, the environment, a caller) asks for. None: says nothing."""

    source: str
    mode: str | None = None
    backends: tuple[tuple[str, str], ...] = ()
    checked: bool | None = None  # look at labels even where a GPU has to be waited for

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(
                f"{self.source}: mode={self.mode!r}; expected one of {', '.join(MODES)}"
            )
        for op_name, backend in self.backends:
            known = (AUTO, *(candidate.name for candidate in find(op_name).candidates))
            if backend not in known:
                raise ValueError(
                    f"{self.source}: {op_name}={backend!r}; expected one of {', '.join(known)}"
                )
            if self.mode == EAGER and backend != EAGER:
                raise ValueError(
                    f"{self.source}: mode=eager runs every op's reference, so {op_name}={backend} "
                    "contradicts it; drop one of the two"
                )

    def backend(self, op_name: str) -> str | None:
        return dict(self.backends).get(op_name)


class Op:
    """An operator and its backends, in order of preference; "eager" is added as the last.

    `describe(**facts)` makes a problem; its first field is the device. `reference` and `self_test`
    are modules: the definition, and `parity(kernel, device) -> float`. `example` holds facts of a
    typical problem beyond device and dtype, for tables that describe no model.
    """

    def __init__(
        self,
        name: str,
        candidates: tuple[Candidate, ...],
        reference: str,
        self_test: str,
        describe: Callable[..., Any],
        example: dict[str, Any],
    ) -> None:
        assert name not in OPS, f"op {name!r} is defined twice"
        self.name = name
        self.candidates = (*candidates, Candidate(EAGER, reference, ()))
        self.self_test = self_test
        self.describe = describe
        self.example = example
        self._selected: dict[Hashable, ModuleType] = {}
        OPS[name] = self

    def select(self, problem: Any, backend: str) -> ModuleType:
        """The module that serves `problem` now. Raises as `choose` does."""
        key = (problem, backend, _overrides, os.environ.get(ENVIRONMENT))
        module = self._selected.get(key)
        if module is None:
            chosen = self.candidate(self.choose(problem, backend).backend).load()
            assert isinstance(chosen, ModuleType)
            module = self._selected[key] = chosen
        return module

    def choose(
        self, problem: Any, requested: str = AUTO, mode: str | None = None, source: str = CALLER
    ) -> Choice:
        """The row of the table for `problem`; `source` is who asks, for reasons and errors."""
        named = () if requested == AUTO else ((self.name, requested),)
        backend, mode, source = self._asked(Settings(source, mode, named))
        if backend != AUTO:
            return self._named(problem, backend, source)
        return self._automatic(problem, mode, source)

    def candidate(self, name: str) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def why_not(self, candidate: Candidate, problem: Any) -> str | None:
        """The reason why `candidate` can't serve `problem`, or None."""
        module = candidate.load()
        if isinstance(module, str):
            return module
        reason: str | None = module.unsupported(problem)
        return reason

    def advice(self, candidate: Candidate, problem: Any) -> str | None:
        """Why `candidate`, which may well serve, had better not be taken by itself; or None."""
        module = candidate.load()
        advise = None if isinstance(module, str) else getattr(module, "advice", None)
        return None if advise is None else advise(problem)

    def forget(self) -> None:
        """Drop remembered selections, after something that they rest on has changed."""
        self._selected.clear()

    def _asked(self, caller: Settings) -> tuple[str, str, str]:
        """The backend and mode in force, and who asked for the backend or, where that is "auto",
        for the mode."""
        backend = mode = None
        backend_source = mode_source = AUTO
        for level in (*_overrides, _environment(), caller):
            if mode is None and level.mode is not None:
                mode, mode_source = level.mode, f"{level.source} (mode={level.mode})"
            if backend is None and level.backend(self.name) is not None:
                backend, backend_source = level.backend(self.name), level.source
            if backend is None and mode == EAGER:
                backend, backend_source = EAGER, mode_source
        if backend is None or backend == AUTO:
            return AUTO, mode or AUTO, mode_source
        return backend, mode or AUTO, backend_source

    def _named(self, problem: Any, backend: str, source: str) -> Choice:
        reason = self.why_not(self.candidate(backend), problem)
        if reason is None:
            return Choice(self.name, backend, f"asked for by {source}")
        able = [c.name for c in self.candidates if self.why_not(c, problem) is None]
        raise UnsupportedKernel(
            f"{self.name}: backend {backend!r}, asked for by {source}, can't serve this call: "
            f"{reason}. These can: {', '.join(able)}"
        )

    def _automatic(self, problem: Any, mode: str, source: str) -> Choice:
        device = problem[0].type
        rejected: list[Rejection] = []
        for candidate in self.candidates:
            if not candidate.made_for(device):
                reason = f"made for {', '.join(candidate.devices)}; the tensors are on {device}"
            else:
                refused = self.why_not(candidate, problem) or self.advice(candidate, problem)
                if refused is None:
                    break
                reason = refused
            rejected.append(Rejection(candidate.name, reason))
        # Candidates that are left after this one are the survivors among which a parity
        # self-test and a timing pass decide, once there is more than order to go by.
        first = next(
            c for c in self.candidates if c.made_for(device) and self.advice(c, problem) is None
        )
        if mode == "strict" and candidate is not first:
            why = next(r.reason for r in rejected if r.backend == first.name)
            raise UnsupportedKernel(
                f"{self.name}: {source} allows no fallback, and {first.name!r}, the first choice "
                f"on {device}, can't serve this call: {why}. {candidate.name!r} could"
            )
        why = f"first choice on {device}" if candidate is first else "first that can serve"
        return Choice(self.name, candidate.name, why, tuple(rejected))


OPS: dict[str, Op] = {}

# The `use()` blocks in force, innermost first. Process-wide rather than per context: autograd runs
# the backward pass of a GPU in a thread of its own, which a context variable would not reach.
_overrides: tuple[Settings, ...] = ()


def find(op_name: str) -> Op:
    """The op called `op_name`. Raises ValueError listing the ops there are."""
    if op_name not in OPS:
        raise ValueError(f"there is no op {op_name!r}; the ops are {', '.join(sorted(OPS))}")
    return OPS[op_name]


@functools.lru_cache(maxsize=8)
def _parse(text: str) -> Settings:
    asked: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(
                f"{ENVIRONMENT}={text!r}: {item!r} is not of the form name=value; "
                'write "mode=strict,rms_norm=triton"'
            )
        if name in asked:
            raise ValueError(f"{ENVIRONMENT}={text!r}: {name} is given twice")
        asked[name] = value
    mode, checked = asked.pop("mode", None), asked.pop("checked", None)
    if checked not in (None, "true", "false"):
        raise ValueError(f"{ENVIRONMENT}={text!r}: checked={checked!r}; expected true or false")
    wants_checks = None if checked is None else checked == "true"
    return Settings(ENVIRONMENT, mode, tuple(asked.items()), wants_checks)


def _environment() -> Settings:
    return _parse(os.environ.get(ENVIRONMENT, ""))


def checked() -> bool:
    """Whether labels on a GPU are to be looked at, which waits for it. See `use`."""
    found = (level.checked for level in (*_overrides, _environment()))
    return next((wish for wish in found if wish is not None), False)


@contextmanager
def use(*, mode: str | None = None, checked: bool | None = None, **backends: str) -> Iterator[None]:
    """Inside the block, ops named here run on the backend named: `with use(rms_norm="triton")`.

    With `checked`, labels that are no class are errors on a GPU too, which then is waited for.

    Process-wide, and above the environment and every `backend=`. A backward pass follows what is
    in force when it runs, so keep it inside the block too. Blocks nest, the inner one first.

    Raises ValueError for an op, backend or mode that doesn't exist, listing those that do. The
    calls inside raise UnsupportedKernel where the backend can't serve.
    """
    global _overrides
    settings = Settings("use()", mode, tuple(backends.items()), checked)
    outside = _overrides
    _overrides = (settings, *outside)
    try:
        yield
    finally:
        _overrides = outside


def choose(
    op: str, *, requested: str = AUTO, mode: str | None = None, source: str = CALLER, **facts: Any
) -> Choice:
    """The backend that calls of `op` with these facts would run on, and why, without running it.

    `facts` are what the op's problem is made of; for rms_norm: `device`, `dtype`, `width`, and
    where they differ from the default `weight_dtype`, `residual_dtype`, `style`. No tensors are
    needed. `requested` is what the caller would pass as `backend=`; `use()` and FASTTRAIN_KERNELS
    go before it and before `mode`. `source` names the caller in reasons and errors.

    Raises UnsupportedKernel where the backend asked for can't serve (mode "strict": where the
    first choice can't), ValueError for unknown names.
    """
    return find(op).choose(find(op).describe(**facts), requested, mode, source)


@dataclass(frozen=True)
class Checked:
    """What a backend's self-test on a device found."""

    op: str
    backend: str
    parity: float | None  # worst error in units of what is allowed; None: not run
    reason: str | None  # why it was not run

    @property
    def passed(self) -> bool:
        return self.parity is not None and self.parity <= 1.0


def check(op: str | None = None, *, device: str | torch.device = "cpu") -> tuple[Checked, ...]:
    """Runs the self-test of every backend that is made for `device`, of `op` or of every op.

    Forward and backward on small fixed problems against exact values: under a second on a CPU,
    longer where Triton has to compile first. A failed test is a row whose `passed` is False, not
    an exception.
    """
    device = torch.device(device)
    rows = []
    for name in sorted(OPS) if op is None else [op]:
        found = find(name)
        parity = importlib.import_module(found.self_test).parity
        for candidate in found.candidates:
            if not candidate.made_for(device.type):
                continue
            problem = found.describe(device=device, dtype=torch.float32, **found.example)
            reason = found.why_not(candidate, problem)
            error = parity(candidate.load(), device) if reason is None else None
            rows.append(Checked(name, candidate.name, error, reason))
    return tuple(rows)


def explain(op: str | None = None, **facts: Any) -> tuple[Choice, ...]:
    """Rows of the kernel table: for `op`, or for every op on a typical problem.

    Takes what `choose` takes, and raises what it raises. For every op, give only `device` and
    `dtype` (and `requested`, `mode`).
    """
    if op is not None:
        return (choose(op, **facts),)
    return tuple(choose(name, **OPS[name].example, **facts) for name in sorted(OPS))
