"""A config from YAML, or from Python, to a checked `TrainConfig`: the first step of every run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain.components import DEFAULT_TYPES
from fasttrain.config import rules
from fasttrain.config.aliases import AliasUse, alias_of, apply_aliases, put, read_alias
from fasttrain.config.environment import interpolate
from fasttrain.config.errors import Problem, UserError
from fasttrain.config.imports import Imported, run_imports
from fasttrain.config.layers import read_layers
from fasttrain.config.normalise import normalise
from fasttrain.config.overrides import Override, parse_overrides
from fasttrain.config.schema.root import TrainConfig
from fasttrain.config.sections import build_config
from fasttrain.config.tree import Node, Origin, assign, key_text, merged, nearest, parse_key


@dataclass(frozen=True)
class LoadedConfig:
    """A config and how it came about."""

    config: TrainConfig
    path: Path | None = None  # the file; None for a config made in Python
    origins: Mapping[str, Origin] = field(default_factory=dict)  # of every value that was given
    masked: Mapping[str, str] = field(default_factory=dict)  # key → what is shown of a secret
    aliases_used: tuple[AliasUse, ...] = ()
    imports: tuple[Imported, ...] = ()
    notes: tuple[str, ...] = ()  # what is legal and worth saying

    @property
    def name(self) -> str:
        """What the run is called where no output_dir is given."""
        return self.path.stem if self.path is not None else "run"


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Read, combine and check a config.

    `source` is a YAML file or a mapping of the same shape; `overrides` are `key.path=value` texts,
    or a mapping of key paths to values. An override replaces what stands at its key. Touches no
    device and no network, and writes nothing. Raises UserError with every problem, in file order.
    """
    environ = os.environ if environ is None else environ
    problems: list[Problem] = []
    layers = read_layers(source, environ, problems)
    assignments = parse_overrides(overrides, problems)
    for override in assignments:
        interpolate(override.node, environ, problems)
    imported = _run_imports(layers, assignments, problems)
    aliases: list[AliasUse] = []
    root = _combined([layer for layer, _ in layers], aliases, problems)
    for override in assignments:
        _apply(root, override, aliases, problems)
    normalise(root)
    config = build_config(root, problems)
    path = None if isinstance(source, Mapping) else Path(source)
    loaded = LoadedConfig(
        config=config,
        path=path,
        origins=_origins(root),
        masked=_masked(root),
        aliases_used=tuple(aliases),
        imports=tuple(imported),
        notes=() if problems else tuple(rules.notes(config)),
    )
    problems += _located(rules.check(config, name=loaded.name, problems=problems), root)
    if problems:
        raise UserError(*_in_file_order(problems))
    return loaded


def _run_imports(
    layers: list[tuple[Node, str]], assignments: list[Override], problems: list[Problem]
) -> list[Imported]:
    """Import what all layers name; the list is left in the last layer, files as absolute paths."""
    nodes: list[tuple[Node, str]] = []
    for layer, directory in layers:
        imports = layer.value.pop("imports", None)
        nodes += _items(imports, directory)
    for override in assignments:
        if override.path == ("imports",):
            nodes = _items(override.node, "")
    assignments[:] = [override for override in assignments if override.path != ("imports",)]
    if nodes:
        layers[-1][0].value["imports"] = Node([node for node, _ in nodes], nodes[0][0].origin)
    return run_imports(nodes, problems)


def _items(node: Node | None, directory: str) -> list[tuple[Node, str]]:
    if node is None or node.value is None:
        return []
    return [(item, directory) for item in (node.value if node.is_list else [node])]


def _combined(layers: list[Node], aliases: list[AliasUse], problems: list[Problem]) -> Node:
    """All layers in one, in full form and by their real names."""
    root: Node | None = None
    for layer in layers:
        normalise(layer)
        aliases += apply_aliases(layer, problems)
        normalise(layer)
        root = layer if root is None else merged(root, layer, DEFAULT_TYPES)
    assert root is not None
    return root


def _apply(
    root: Node, override: Override, aliases: list[AliasUse], problems: list[Problem]
) -> None:
    """Put one override into the tree."""
    try:
        alias = alias_of(override.path)
        if alias is not None:
            aliases += read_alias(root, alias, override.node, set(), problems)
        elif len(override.path) > 1 and override.path[0] == "checkpoint":
            put(root, override.path, override.node)
        else:
            assign(root, override.path, override.node)
    except LookupError as error:
        where = override.node.origin.where
        problems.append(Problem(f"{error.args[0]}.", where=where, key=override.key))
    normalise(root)


# --- where and what ------------------------------------------------------------------------------


def _origins(node: Node, path: tuple[str | int, ...] = ()) -> dict[str, Origin]:
    """The origin of every leaf, and of every empty list and mapping, by key."""
    children = node.children()
    if not children:
        return {key_text(path): node.origin} if path else {}
    found: dict[str, Origin] = {}
    for step, part in children:
        found |= _origins(part, (*path, step))
    return found


def _masked(node: Node, path: tuple[str | int, ...] = ()) -> dict[str, str]:
    found = {key_text(path): node.masked} if node.masked is not None else {}
    for step, part in node.children():
        found |= _masked(part, (*path, step))
    return found


def _located(problems: list[Problem], root: Node) -> list[Problem]:
    """Rules name keys; the tree knows their lines."""
    return [
        Problem(
            problem.what,
            where=problem.where or nearest(root, parse_key(problem.key) or ()).origin.where,
            key=problem.key,
            hint=problem.hint,
        )
        for problem in problems
    ]


def _in_file_order(problems: list[Problem]) -> list[Problem]:
    """By file, in order of appearance, then by line; each once."""
    files: dict[str, int] = {}

    def place(problem: Problem) -> tuple[int, int]:
        file, _, line = problem.where.rpartition(":")
        if not line.isdigit():
            file, line = problem.where, "0"
        return files.setdefault(file, len(files)), int(line)

    return sorted(dict.fromkeys(problems), key=place)
