"""One table per kind of building block: built-ins from fasttrain/components.py, and yours by decorator."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from fasttrain.components import BUILT_INS

C = TypeVar("C", bound=type)


def resolve(path: str) -> Any:
    """The object at `module:Name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class Registry:
    """Components of one kind by name. A built-in's config resolves without its component."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._built_in = {name: entry for (k, name), entry in BUILT_INS.items() if k == kind}
        self._registered: dict[str, type] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator. A taken name is a ValueError that says who has it."""

        def decorate(component: C) -> C:
            if name in self._built_in:
                raise ValueError(f"{self.kind} '{name}' is a built-in; choose another name.")
            owner = self._registered.get(name)
            # The same file imported twice (two runs in one process) registers the same class again.
            if owner is not None and owner.__qualname__ != component.__qualname__:
                raise ValueError(
                    f"{self.kind} '{name}' is taken by {owner.__module__}.{owner.__qualname__}."
                )
            if not isinstance(getattr(component, "Config", None), type):
                raise ValueError(
                    f"{self.kind} '{name}': {component.__qualname__} needs a class attribute Config, "
                    f"its typed section."
                )
            self._registered[name] = component
            return component

        return decorate

    def names(self) -> list[str]:
        """Every known name, sorted."""
        return sorted({*self._built_in, *self._registered})

    def config(self, name: str) -> type:
        """The typed section of `name`; KeyError lists the known names."""
        if name in self._registered:
            config: type = self._registered[name].Config  # type: ignore[attr-defined]
            return config
        return resolve(self._entry(name).config)  # type: ignore[no-any-return]

    def component(self, name: str) -> Any:
        """The class of `name`; KeyError lists the known names."""
        if name in self._registered:
            return self._registered[name]
        return resolve(self._entry(name).component)

    def _entry(self, name: str) -> Any:
        if name not in self._built_in:
            raise KeyError(f"no {self.kind} '{name}'. There are: {', '.join(self.names())}.")
        return self._built_in[name]


TRAINERS = Registry("trainer")
MODELS = Registry("model")
TRANSFORMS = Registry("transform")
TOKENIZERS = Registry("tokenizer")
DATA = Registry("data")
SOURCES = Registry("source")
OPTIMIZERS = Registry("optimizer")
SCHEDULERS = Registry("scheduler")
CHECKPOINTS = Registry("checkpoint")
ENGINES = Registry("engine")
CALLBACKS = Registry("callback")

REGISTRIES: dict[str, Registry] = {
    registry.kind: registry
    for registry in (
        TRAINERS,
        MODELS,
        TRANSFORMS,
        TOKENIZERS,
        DATA,
        SOURCES,
        OPTIMIZERS,
        SCHEDULERS,
        CHECKPOINTS,
        ENGINES,
        CALLBACKS,
    )
}
