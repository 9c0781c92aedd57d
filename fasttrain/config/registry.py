"""One table per kind of building block: built-ins by components.py, and yours by decorator."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fasttrain.components import BUILT_INS

if TYPE_CHECKING:
    from fasttrain.config.schema.base import ComponentSection

C = TypeVar("C", bound=type)


# Files under `imports:` by their stem, so that `my_code:Class` finds what ./my_code.py defines.
IMPORTED_FILES: dict[str, str] = {}


def resolve(path: str) -> Any:
    """The object at `module:Name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(IMPORTED_FILES.get(module, module)), name)


class Registry:
    """Components of one kind by name. A built-in's config resolves without its component.

    Wherever a name is taken, `module:Class` names a class of yours that nobody registered.
    """

    def __init__(self, kind: str, section: str) -> None:
        self.kind = kind
        self._section = section
        self._built_in = {name: entry for (k, name), entry in BUILT_INS.items() if k == kind}
        self._registered: dict[str, type] = {}

    @property
    def section(self) -> type[ComponentSection]:
        """The section that every component's Config derives from."""
        section: type[ComponentSection] = resolve(self._section)
        return section

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator. A taken name is a ValueError that says who has it."""

        def decorate(component: C) -> C:
            if name in self._built_in:
                raise ValueError(f"{self.kind} '{name}' is a built-in; choose another name.")
            owner = self._registered.get(name)
            # A module executed twice registers the same class again.
            if owner is not None and _identity(owner) != _identity(component):
                raise ValueError(
                    f"{self.kind} '{name}' is taken by {owner.__module__}.{owner.__qualname__}."
                )
            self._config_of(component)
            self._registered[name] = component
            return component

        return decorate

    def forget(self, module_prefix: str) -> None:
        """Drop what modules whose name begins so have registered."""
        self._registered = {
            name: component
            for name, component in self._registered.items()
            if not component.__module__.startswith(module_prefix)
        }

    def names(self) -> list[str]:
        """Every known name, sorted."""
        return sorted({*self._built_in, *self._registered})

    def config(self, name: str) -> type[Any]:
        """The typed section of `name`; KeyError lists the known names."""
        if name in self._registered:
            return self._config_of(self._registered[name])
        if ":" in name:
            return self._config_of(resolve(name))
        config: type[ComponentSection] = resolve(self._entry(name).config)
        return config

    def component(self, name: str) -> Any:
        """The class of `name`; KeyError lists the known names."""
        if name in self._registered:
            return self._registered[name]
        return resolve(name if ":" in name else self._entry(name).component)

    def _entry(self, name: str) -> Any:
        if name not in self._built_in:
            raise KeyError(f"no {self.kind} '{name}'. There are: {', '.join(self.names())}.")
        return self._built_in[name]

    def _config_of(self, component: Any) -> type[ComponentSection]:
        """A class's Config; one without has the options that all of its kind have."""
        config = getattr(component, "Config", None)
        section = self.section
        if config is None:
            return section
        if not (isinstance(config, type) and issubclass(config, section)):
            raise ValueError(
                f"{component.__qualname__}.Config must derive from "
                f"{section.__module__}.{section.__qualname__}."
            )
        return config


def _identity(component: type) -> tuple[str, str]:
    return component.__module__, component.__qualname__


_SCHEMA = "fasttrain.config.schema"

TRAINERS = Registry("trainer", f"{_SCHEMA}.trainer:TrainerSection")
MODELS = Registry("model", f"{_SCHEMA}.model:ModelSection")
TRANSFORMS = Registry("transform", f"{_SCHEMA}.model:TransformSection")
TOKENIZERS = Registry("tokenizer", f"{_SCHEMA}.tokenizer:TokenizerSection")
DATA = Registry("data", f"{_SCHEMA}.data:DataSection")
SOURCES = Registry("source", f"{_SCHEMA}.data:SourceSection")
OPTIMIZERS = Registry("optimizer", f"{_SCHEMA}.optimizer:OptimizerSection")
SCHEDULERS = Registry("scheduler", f"{_SCHEMA}.scheduler:SchedulerSection")
CHECKPOINTS = Registry("checkpoint", f"{_SCHEMA}.checkpoint:CheckpointSection")
ENGINES = Registry("engine", f"{_SCHEMA}.engine:EngineSection")
CALLBACKS = Registry("callback", f"{_SCHEMA}.callback:CallbackSection")

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
