"""The tree into typed sections: each is checked by the class that its `type` names."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from fasttrain.components import DEFAULT_TYPES
from fasttrain.config import registry
from fasttrain.config.aliases import ALIASES
from fasttrain.config.errors import Problem
from fasttrain.config.explain import describe, keys_at, shown, suggestion
from fasttrain.config.registry import Registry
from fasttrain.config.schema.base import ComponentSection
from fasttrain.config.schema.root import TrainConfig
from fasttrain.config.tree import KeyPath, Node, find, from_plain, key_text, nearest, plain

# Top-level keys that hold one component.
COMPONENTS: dict[str, Registry] = {
    "model": registry.MODELS,
    "tokenizer": registry.TOKENIZERS,
    "data": registry.DATA,
    "optimizer": registry.OPTIMIZERS,
    "scheduler": registry.SCHEDULERS,
    "engine": registry.ENGINES,
}
# (section, key) that hold a list of components; "" is the top level.
COMPONENT_LISTS: dict[tuple[str, str], Registry] = {
    ("", "checkpoint"): registry.CHECKPOINTS,
    ("", "callbacks"): registry.CALLBACKS,
    ("model", "transforms"): registry.TRANSFORMS,
    ("data", "sources"): registry.SOURCES,
    ("data", "eval_sources"): registry.SOURCES,
}


def build_config(root: Node, problems: list[Problem]) -> TrainConfig:
    """The typed config of a normalised tree. With problems, what is wrong in it is None."""
    return _Builder(root, problems).build()


class _Builder:
    """Builds from the leaves up: every section is checked, whatever is wrong with the others."""

    def __init__(self, root: Node, problems: list[Problem]) -> None:
        self._root = root
        self._problems = problems
        self._told = {(problem.where, problem.key) for problem in problems}  # once is enough

    def build(self) -> TrainConfig:
        values: dict[str, Any] = {}
        for key, node in self._root.value.items():
            if key in COMPONENTS:
                values[key] = self._component(node, (key,), COMPONENTS[key], DEFAULT_TYPES.get(key))
            elif ("", key) in COMPONENT_LISTS:
                values[key] = self._entries(node, (key,), COMPONENT_LISTS["", key])
            else:
                values[key] = plain(node)
        values["trainer"] = self._trainer()
        config: TrainConfig = self._validated(TrainConfig, values, ())
        return config

    def _trainer(self) -> Any:
        """The method's options: their type is the top-level one."""
        method = self._root.value.get("type")
        name = method.value if method is not None else TrainConfig.model_fields["type"].default
        empty = from_plain({}, self._root.origin)
        node = self._root.value.get("trainer", empty)
        own = node.value.get("type") if node.is_mapping else None
        if own is not None and own.value != name:
            what = (
                f"another method than the top-level `type` (got {shown(own)}, expected '{name}')."
            )
            self._report(own, ("trainer", "type"), what, "Set `type` alone.")
        if not isinstance(name, str):
            return registry.TRAINERS.section.model_construct()  # the root reports its type
        config = self._config(registry.TRAINERS, name, ("type",))
        return self._section(config, registry.TRAINERS, name, node, ("trainer",))

    def _component(
        self, node: Node, path: KeyPath, kind: Registry, default: str | None = None
    ) -> Any:
        """One component's section."""
        if not node.is_mapping:
            what = f"not a mapping (got {shown(node)}, expected `key: value` lines)."
            self._report(node, path, what)
            return kind.section.model_construct()
        chosen = node.value.get("type")
        name = chosen.value if chosen is not None else default
        if not isinstance(name, str):
            what = "the type is missing." if chosen is None else f"no type (got {shown(chosen)})."
            hint = f"There are: {', '.join(kind.names())}."
            self._report(chosen or node, (*path, "type"), what, hint)
            return kind.section.model_construct()
        config = self._config(kind, name, (*path, "type"))
        return self._section(config, kind, name, node, path)

    def _section(
        self, config: Any, kind: Registry, name: str, node: Node, path: KeyPath
    ) -> ComponentSection:
        if config is None or not node.is_mapping:
            if config is not None:
                what = f"not a mapping (got {shown(node)}, expected `key: value` lines)."
                self._report(node, path, what)
            section: ComponentSection = kind.section.model_construct(type=name)
            return section
        field = config.model_fields["type"]
        values: dict[str, Any] = {}
        for key, part in node.value.items():
            inner = COMPONENT_LISTS.get((str(path[0]), key)) if len(path) == 1 else None
            values[key] = (
                self._entries(part, (*path, key), inner)
                if inner is not None and key in config.model_fields
                else plain(part)
            )
        # A class of the user's may inherit a built-in's section, whose type is another name.
        values["type"] = name if field.is_required() else field.default
        built: ComponentSection = self._validated(config, values, path)
        return built if built.type == name else built.model_copy(update={"type": name})

    def _entries(self, node: Node, path: KeyPath, kind: Registry) -> Any:
        if not node.is_list:
            return plain(node)  # the section it belongs to refuses it
        return tuple(
            self._component(item, (*path, index), kind) for index, item in enumerate(node.value)
        )

    def _config(self, kind: Registry, name: str, path: KeyPath) -> Any:
        """The class of a type's section, or None after a report."""
        node = nearest(self._root, path)
        if ":" not in name and name not in kind.names():
            names = ", ".join(kind.names())
            what = f"unknown {kind.kind} type (got '{name}', expected one of: {names})."
            close = suggestion(name, kind.names())
            self._report(node, path, what, close if close.startswith("Did") else "")
            return None
        try:
            return kind.config(name)
        except Exception as error:  # importing a class of the user's may raise anything
            text = str(error).split("\n")[0]
            what = f"'{name}' cannot be used as a {kind.kind}: {type(error).__name__}: {text}."
            self._report(node, path, what.replace("..", "."))
            return None

    # --- validation ------------------------------------------------------------------------------

    def _validated(self, config: type[BaseModel], values: dict[str, Any], path: KeyPath) -> Any:
        """The section; where it has problems, one whose wrong values are None."""
        for retyped in (False, True):
            try:
                return config.model_validate(values)
            except ValidationError as error:
                errors = error.errors(include_url=False)
            if retyped or not self._retype(errors, values, path):
                break
        for found in errors:
            self._explain(config, found, path)
        return _without(config, values, {str(found["loc"][0]) for found in errors if found["loc"]})

    def _retype(self, errors: list[Any], values: dict[str, Any], path: KeyPath) -> bool:
        """Take command-line and environment values as the text they are, where text is wanted."""
        changed = False
        for error in errors:
            node = find(self._root, (*path, *error["loc"]))
            if error["type"] != "string_type" or node is None or node.raw is None:
                continue
            node.value = node.raw
            target: Any = values
            for step in error["loc"][:-1]:
                target = target[step]
            target[error["loc"][-1]] = node.raw
            changed = True
        return changed

    def _explain(self, config: type[BaseModel], error: Any, path: KeyPath) -> None:
        loc = error["loc"]
        full = (*path, *loc)
        node = find(self._root, full)
        if error["type"] == "extra_forbidden":
            hint = self._unknown_key_hint(config, loc, full)
            self._report(nearest(self._root, full), full, "unknown key.", hint)
        elif error["type"] == "missing":
            field = config.model_fields.get(str(loc[0])) if len(loc) == 1 else None
            help_text = " ".join((field.description or "").split()) if field else ""
            hint = f"It is needed: {help_text}" if help_text else ""
            self._report(nearest(self._root, full), full, "missing.", hint)
        else:
            self._report(nearest(self._root, full), full, describe(error, node))

    def _unknown_key_hint(
        self, config: type[BaseModel], loc: tuple[str | int, ...], full: KeyPath
    ) -> str:
        """The nearest key of the section, or the section that a key like it belongs to."""
        name = str(loc[-1])
        homes = _homes()
        if homes.get(name) == key_text(full):  # a section of another `type` has it
            kind = COMPONENTS[str(full[0])]
            having = [t for t in kind.names() if name in kind.config(t).model_fields]
            return f"It belongs to {', '.join(having)}."
        own = keys_at(config, loc[:-1])
        for known in ({name} & set(homes), own, homes):
            close = difflib.get_close_matches(name, known, n=1)
            if close:
                return f"Did you mean '{close[0] if close[0] in own else homes[close[0]]}'?"
        return suggestion(name, own)

    def _report(self, node: Node, path: KeyPath, what: str, hint: str = "") -> None:
        where, key = node.origin.where, key_text(path)
        if (where, key) not in self._told:
            self._problems.append(Problem(what, where=where, key=key, hint=hint))


class _Undocumented(BaseModel):
    """Looking the help of the fields up in the source takes ten times as long as all else."""

    model_config = ConfigDict(use_attribute_docstrings=False)


def _without(config: type[BaseModel], values: dict[str, Any], wrong: set[str]) -> Any:
    """The section with None where a value is wrong, for the rules that read the others."""
    fields: Any = {key: (Any, None) for key in wrong if key in config.model_fields}
    partial = create_model(config.__name__, __base__=(config, _Undocumented), **fields)
    try:
        return partial.model_validate({k: v for k, v in values.items() if k not in wrong})
    except ValidationError:  # the section as a whole is wrong, and no rule reads it
        return config.model_construct()


def _homes() -> dict[str, str]:
    """Where each key belongs, as a full path."""
    homes = {key: key for key in TrainConfig.model_fields}
    homes |= {alias: key for alias, key in ALIASES.items() if "." not in alias}
    for key in ("kernels", "eval", "logging"):
        for inner in keys_at(TrainConfig, (key,)):
            homes.setdefault(inner, f"{key}.{inner}")
    for key, kind in COMPONENTS.items():
        for name in kind.names():
            for inner in kind.config(name).model_fields:
                homes.setdefault(inner, f"{key}.{inner}")
    return homes
