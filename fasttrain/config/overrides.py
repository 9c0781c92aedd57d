"""Values from the command line: `key.path=value`, the value read as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.tree import KeyPath, Node, Origin, from_plain, parse_key
from fasttrain.config.yaml_reader import parse

COMMAND_LINE = Origin("command line")


@dataclass(frozen=True)
class Override:
    """One value and where it goes."""

    key: str  # as written
    path: KeyPath
    node: Node


def parse_overrides(
    overrides: Sequence[str] | Mapping[str, Any], problems: list[Problem]
) -> list[Override]:
    """Each `key.path=value` (or, from Python, each item of a mapping of key paths to values)."""
    if isinstance(overrides, Mapping):
        return _from_mapping(overrides, problems)
    parsed = (_from_text(text, problems) for text in overrides)
    return [override for override in parsed if override is not None]


def _from_mapping(overrides: Mapping[str, Any], problems: list[Problem]) -> list[Override]:
    found = []
    for key, value in overrides.items():
        path = parse_key(key)
        if path is None:
            problems.append(Problem(f"no key path (got '{key}')."))
        else:
            found.append(Override(key, path, from_plain(value, Origin("python"))))
    return found


def _from_text(text: str, problems: list[Problem]) -> Override | None:
    key, equals, value = text.partition("=")
    path = parse_key(key) if equals else None
    if path is None:
        what = f"not an override (got '{text}', expected key.path=value)."
        problems.append(Problem(what, where=COMMAND_LINE.where))
        return None
    node = _value(key, value, problems)
    return Override(key, path, node) if node is not None else None


def _value(key: str, text: str, problems: list[Problem]) -> Node | None:
    try:
        node = parse(text, lambda line, column: COMMAND_LINE, problems)
    except UserError as error:
        for problem in error.problems:
            hint = "Quote text that holds ': ', '{', '[' or '#'."
            problems.append(Problem(problem.what, where=problem.where, key=key, hint=hint))
        return None
    _keep_text(node, text)
    return node


def _keep_text(node: Node, text: str) -> None:
    """`revision=1234` is text where the schema wants text."""
    if not (node.is_mapping or node.is_list or isinstance(node.value, str)):
        node.raw = text.strip()
