"""Values from the environment where a config asks: `${env:NAME}`, `${env:NAME:-default}`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from fasttrain.config.errors import Problem
from fasttrain.config.tree import KeyPath, Node, key_text
from fasttrain.config.yaml_reader import resolve_scalar

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_VARIABLE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)(:-.*)?", re.DOTALL)
_FORMS = "${env:NAME} or ${env:NAME:-default}"
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)


def interpolate(
    node: Node, environ: Mapping[str, str], problems: list[Problem], path: KeyPath = ()
) -> None:
    """Replace every `${env:…}` of the tree. An unset variable without default is a problem."""
    for step, part in node.children():
        interpolate(part, environ, problems, (*path, step))
    if isinstance(node.value, str) and "${" in node.value:
        _read_variables(node, environ, problems, key_text(path))


def _read_variables(
    node: Node, environ: Mapping[str, str], problems: list[Problem], key: str
) -> None:
    written = node.value
    used: list[str] = []

    def value_of(match: re.Match[str]) -> str:
        variable = _VARIABLE.fullmatch(match[1])
        if variable is None:
            hint = f"Write ${{env:{match[1]}}}." if match[1].isidentifier() else ""
            what = f"unreadable (got '{match[0]}', expected {_FORMS})."
            problems.append(Problem(what, where=node.origin.where, key=key, hint=hint))
            return match[0]
        name, default = variable[1], variable[2]
        if environ.get(name):
            used.append(name)
            return environ[name]
        if default is None:
            what = f"the environment variable {name} is not set."
            hint = f"Set it, or write ${{env:{name}:-default}}."
            problems.append(Problem(what, where=node.origin.where, key=key, hint=hint))
        return (default or ":-")[2:]

    text = _REFERENCE.sub(value_of, written)
    whole = _REFERENCE.fullmatch(written) is not None
    node.value = resolve_scalar(text) if whole else text
    node.raw = text
    if used:
        node.origin = replace(node.origin, environment=", ".join(used))
    if any(_SECRET.search(name) for name in used):
        node.masked = written
