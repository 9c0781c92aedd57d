"""The files of a config: the one that is given, and before it those that it `extends`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasttrain.config.environment import interpolate
from fasttrain.config.errors import Problem, UserError
from fasttrain.config.tree import Node, Origin, from_plain
from fasttrain.config.yaml_reader import parse, read_file


def read_layers(
    source: str | Path | Mapping[str, Any],
    environ: Mapping[str, str],
    problems: list[Problem],
) -> list[tuple[Node, str]]:
    """(mapping, directory its imports are relative to) of each layer, the lowest base first.

    Raises UserError where a file cannot be read or the files extend each other in a circle.
    """
    if isinstance(source, Mapping):
        layer, directory = from_plain(source, Origin("python")), ""
        interpolate(layer, environ, problems)
        return [*_bases(layer, directory, [], environ, problems), (layer, directory)]
    return _read(str(source), [], environ, problems)


def _read(
    path: str, chain: list[str], environ: Mapping[str, str], problems: list[Problem]
) -> list[tuple[Node, str]]:
    """The layers of one file. `chain` holds the files that led here."""
    text = read_file(path)
    layer = parse(text, lambda line, column: Origin("file", path, line, column), problems)
    if layer.value is None:
        raise UserError(Problem("the config is empty.", where=path))
    if not layer.is_mapping:
        kind = "a list" if layer.is_list else "a single value"
        what = f"the config is {kind} (expected `key: value` lines)."
        raise UserError(Problem(what, where=layer.origin.where))
    layer.origin = Origin("file", path)
    interpolate(layer, environ, problems)
    directory = os.path.dirname(path)
    return [*_bases(layer, directory, [*chain, path], environ, problems), (layer, directory)]


def _bases(
    layer: Node,
    directory: str,
    chain: list[str],
    environ: Mapping[str, str],
    problems: list[Problem],
) -> list[tuple[Node, str]]:
    """The layers below one, whose `extends` is taken out."""
    extends = layer.value.pop("extends", None)
    if extends is None or extends.value is None:
        return []
    where = extends.origin.where
    if not isinstance(extends.value, str):
        raise UserError(Problem("not a path (expected one YAML file).", where=where, key="extends"))
    path = os.path.join(directory, os.path.expanduser(extends.value))
    path = os.path.normpath(path)
    files = [os.path.realpath(file) for file in chain]
    if os.path.realpath(path) in files:
        circle = chain[files.index(os.path.realpath(path)) :]
        text = " → ".join([*circle, path])
        raise UserError(Problem(f"a circle: {text}.", where=where, key="extends"))
    if not os.path.isfile(path):
        kind = "not a file" if os.path.exists(path) else "no such file"
        hint = "The path is relative to the file that names it."
        raise UserError(Problem(f"{kind} (got '{path}').", where=where, key="extends", hint=hint))
    return _read(path, chain, environ, problems)
