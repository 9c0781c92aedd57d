"""What was asked of the choice of kernels, and by whom: `use()`, the environment, the caller.

Three levels, each of which may say something of every setting, or nothing: `use()` goes before the
environment, `FASTTRAIN_KERNELS="mode=strict,rms_norm=triton"`, which goes before the caller's own
`backend=` and `mode=`. What no level says is "auto".
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from fasttrain_kernels.registry import OPS, find

ENVIRONMENT = "FASTTRAIN_KERNELS"
AUTO = "auto"
EAGER = "eager"
STRICT = "strict"
PREFER = "auto:"  # before a name: "auto", which takes this one first
CALLER = "backend="
MODES = (AUTO, EAGER, STRICT)
AUTOTUNE = ("off", "cached", "full")
ALL_PROVIDERS = "all"

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What one level asks for. None: says nothing."""

    source: str
    mode: str | None = None
    backends: tuple[tuple[str, str], ...] = ()
    checked: bool | None = None  # look at labels even where a GPU has to be waited for
    autotune: str | None = None
    deterministic: bool | None = None
    providers: tuple[str, ...] | None = None  # that may serve; ("all",) for every one

    def __post_init__(self) -> None:
        self._one_of("mode", self.mode, MODES)
        self._one_of("autotune", self.autotune, AUTOTUNE)
        for name in self.providers or ():
            self._one_of("providers", name, (ALL_PROVIDERS, *provider_names()))
        for op_name, backend in self.backends:
            self._check_backend(op_name, backend)

    def _one_of(self, key: str, value: str | None, known: tuple[str, ...]) -> None:
        if value is not None and value not in known:
            raise ValueError(f"{self.source}: {key}={value!r}; expected one of {', '.join(known)}")

    def _check_backend(self, op_name: str, backend: str) -> None:
        candidates = find(op_name).candidates
        names = tuple(candidate.name for candidate in candidates)
        self._one_of(op_name, backend.removeprefix(PREFER), (AUTO, *names))
        if self.mode == EAGER and backend != EAGER:
            raise ValueError(
                f"{self.source}: mode=eager runs every op's reference, so {op_name}={backend} "
                "contradicts it; drop one of the two"
            )
        named = next((candidate for candidate in candidates if candidate.name == backend), None)
        wanted = (ALL_PROVIDERS,) if self.providers is None else self.providers
        if named is not None and named.provider and not allows(wanted, backend):
            raise ValueError(
                f"{self.source}: providers={'+'.join(self.providers or ()) or 'none'} leaves "
                f"{backend} out, so {op_name}={backend} contradicts it; drop one of the two"
            )

    def backend(self, op_name: str) -> str | None:
        return dict(self.backends).get(op_name)


class Wish(NamedTuple):
    """What all levels together ask for one op."""

    backend: str  # AUTO, AUTO with a first one, or a name
    mode: str
    source: str  # who asked for the backend or, where that is "auto", for the mode
    autotune: str
    deterministic: bool
    providers: tuple[str, ...]

    @property
    def named(self) -> bool:
        return self.backend != AUTO and not self.backend.startswith(PREFER)

    @property
    def preferred(self) -> str | None:
        return self.backend.removeprefix(PREFER) if self.backend.startswith(PREFER) else None


# The `use()` blocks in force, innermost first. Process-wide rather than per context: autograd runs
# the backward pass of a GPU in a thread of its own, which a context variable would not reach.
_overrides: tuple[Settings, ...] = ()
_overriding = threading.Lock()


def in_force() -> tuple[object, ...]:
    """What a remembered choice depends on beside its problem and its caller; cheap to compare."""
    return _overrides, os.environ.get(ENVIRONMENT)


def wish(op_name: str, caller: Settings) -> Wish:
    """What is asked for `op_name`, all levels together."""
    levels = (*_overrides, _environment(), caller)
    backend = mode = None
    backend_source = mode_source = AUTO
    for level in levels:
        if mode is None and level.mode is not None:
            mode, mode_source = level.mode, f"{level.source} (mode={level.mode})"
        if backend is None and level.backend(op_name) is not None:
            backend, backend_source = level.backend(op_name), level.source
        if backend is None and mode == EAGER:
            backend, backend_source = EAGER, mode_source
    automatic = backend is None or backend.startswith(AUTO)
    return Wish(
        backend or AUTO,
        mode or AUTO,
        mode_source if automatic else backend_source,
        _first([level.autotune for level in levels], "cached"),
        _first([level.deterministic for level in levels], False),
        _first([level.providers for level in levels], (ALL_PROVIDERS,)),
    )


def _first(said: list[T | None], default: T) -> T:
    return next((value for value in said if value is not None), default)


def allows(providers: tuple[str, ...], name: str) -> bool:
    """Whether a backend of others is among those that may serve."""
    return ALL_PROVIDERS in providers or name in providers


def provider_names() -> tuple[str, ...]:
    """Backends that are somebody else's code."""
    names = (c.name for op in OPS.values() for c in op.candidates if c.provider)
    return tuple(dict.fromkeys(names))


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
    providers = asked.pop("providers", None)
    return Settings(
        ENVIRONMENT,
        mode=asked.pop("mode", None),
        autotune=asked.pop("autotune", None),
        checked=_flag(text, "checked", asked.pop("checked", None)),
        deterministic=_flag(text, "deterministic", asked.pop("deterministic", None)),
        providers=None if providers is None else _names(providers),
        backends=tuple(asked.items()),
    )


def _flag(text: str, name: str, value: str | None) -> bool | None:
    if value not in (None, "true", "false"):
        raise ValueError(f"{ENVIRONMENT}={text!r}: {name}={value!r}; expected true or false")
    return None if value is None else value == "true"


def _names(text: str) -> tuple[str, ...]:
    """Of "flash-attn+sdpa"; "none" is none."""
    return () if text == "none" else tuple(text.split("+"))


def _environment() -> Settings:
    return _parse(os.environ.get(ENVIRONMENT, ""))


def checked() -> bool:
    """Whether labels on a GPU are to be looked at, which waits for it. See `use`."""
    return _first([level.checked for level in (*_overrides, _environment())], False)


@contextmanager
def use(
    *,
    mode: str | None = None,
    checked: bool | None = None,
    autotune: str | None = None,
    deterministic: bool | None = None,
    providers: tuple[str, ...] | None = None,
    **backends: str,
) -> Iterator[None]:
    """Inside the block, ops named here run on the backend named: `with use(rms_norm="triton")`.

    mode: "strict" makes any fallback an error, "eager" takes every op's reference.
    autotune: "off" goes by the order of preference; "cached", which is the default, by times that
        were measured on this machine before; "full" measures what has no times yet, in the call.
    deterministic: passes over backends whose bits vary from call to call.
    providers: the backends of others that may be chosen, by name; () for none.
    With `checked`, labels that are no class are errors on a GPU too, which then is waited for.

    Process-wide, and above the environment and every `backend=`. A backward pass follows what is
    in force when it runs, so keep it inside the block too. Blocks nest, the inner one first.

    Raises ValueError for an op, backend or mode that doesn't exist, listing those that do. The
    calls inside raise UnsupportedKernel where the backend can't serve.
    """
    chosen = tuple(backends.items())
    with put_above(Settings("use()", mode, chosen, checked, autotune, deterministic, providers)):
        yield


@contextmanager
def put_above(settings: Settings) -> Iterator[None]:
    """Inside the block, `settings` go before all others."""
    global _overrides
    settings = replace(settings)  # an object of its own: it is what is taken away again
    with _overriding:
        _overrides = (settings, *_overrides)
    try:
        yield
    finally:
        with _overriding:  # another thread may have begun a block since, or ended one
            _overrides = tuple(other for other in _overrides if other is not settings)
