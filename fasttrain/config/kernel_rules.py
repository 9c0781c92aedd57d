"""Rules of `kernels:` that span keys: what contradicts what, and names that must exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import get_args

from fasttrain.config.errors import Problem
from fasttrain.config.schema.kernels import PROVIDERS, RESERVED, KernelsConfig
from fasttrain.config.schema.root import TrainConfig

AUTO, EAGER = "auto", "eager"


def ops() -> tuple[str, ...]:
    """Every op that a config can name."""
    return tuple(name for name in KernelsConfig.model_fields if name not in RESERVED)


def backends_of(op: str) -> tuple[str, ...]:
    """What a config can ask of an op, "auto" and "eager" included."""
    return get_args(KernelsConfig.model_fields[op].annotation)


def check_kernels(config: TrainConfig) -> Iterator[Problem]:
    """Names in `sites` and `providers`, and requests that no plan could meet."""
    kernels = config.kernels
    for name in _providers(kernels):
        if name not in PROVIDERS:
            yield Problem(
                f"there is no provider '{name}'.", key="kernels.providers", hint=_nearest(name)
            )
    for key, op, backend in _requests(kernels):
        if op not in ops():
            hint = f"The ops are {', '.join(ops())}."
            yield Problem(f"there is no op '{op}'.", key=key, hint=hint)
        elif backend not in backends_of(op):
            hint = f"Expected one of {', '.join(backends_of(op))}."
            yield Problem(f"{op} has no backend '{backend}'.", key=key, hint=hint)
        elif kernels.mode == EAGER and backend not in (AUTO, EAGER):
            what = f"mode: eager uses no kernel, and '{backend}' is asked for."
            yield Problem(what, key=key, hint="Drop one of the two.")
        elif backend in PROVIDERS and backend not in _allowed(kernels):
            what = f"'{backend}' is asked for, and kernels.providers leaves it out."
            yield Problem(what, key=key, hint="Drop one of the two.")


def _requests(kernels: KernelsConfig) -> Iterator[tuple[str, str, str]]:
    """(key, op, backend) of everything that is asked for by name."""
    for op in ops():
        yield f"kernels.{op}", op, getattr(kernels, op)
    for pattern, backends in kernels.sites.items():
        key = f"kernels.sites.{pattern}"
        if isinstance(backends, dict):
            for op, backend in backends.items():
                yield key, op, backend
            continue
        # One op that has it stands for all; a name that none has is told with the first one's.
        yield key, next((op for op in ops() if backends in backends_of(op)), ops()[0]), backends


def _providers(kernels: KernelsConfig) -> tuple[str, ...]:
    return kernels.providers if isinstance(kernels.providers, tuple) else ()


def _allowed(kernels: KernelsConfig) -> tuple[str, ...]:
    return PROVIDERS if kernels.providers == "all" else _providers(kernels)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, PROVIDERS, n=1)
    return f"Did you mean {near[0]}?" if near else f"They are {', '.join(PROVIDERS)}."
