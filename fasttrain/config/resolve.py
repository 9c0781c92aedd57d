"""The resolved config: every value with its origin, as YAML that loads to the same config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from fasttrain.config.load import LoadedConfig
from fasttrain.config.schema.base import Section
from fasttrain.config.tree import KeyPath, Origin, from_plain, key_text, plain
from fasttrain.config.yaml_reader import parse, resolve_scalar

# What may change between two starts of one run: none of it changes what is learnt, other than by
# rounding (engine, kernels).
FREE_TO_CHANGE: tuple[str, ...] = (
    "checkpoint",
    "data.cache_dir",
    "data.num_workers",
    "engine",
    "eval",
    "imports",
    "kernels",
    "kill_file",
    "logging",
    "output_dir",
    "resume",
    "stop_after",
)
# Callbacks that only look.
FREE_CALLBACKS: tuple[str, ...] = (
    "console",
    "kernel_selection",
    "loss_plot",
    "metrics_file",
    "samples",
    "tensorboard",
    "unigram_baseline",
)

ABSENT = "(absent)"


def resolved_yaml(loaded: LoadedConfig) -> str:
    """Every key with its value, defaults included, each with its origin as a comment.

    A secret is written as the `${env:NAME}` it came from.
    """
    lines = [*_lines(_plain(loaded.config), (), loaded, "")]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """Sections as mappings in the order of their fields, tuples as lists."""
    if isinstance(value, Section):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _lines(value: Any, path: KeyPath, loaded: LoadedConfig, lead: str) -> Iterator[str]:
    """The lines of a mapping or list. `lead` is what its first line begins with (`  - `)."""
    indent = " " * len(lead)
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for number, (step, part) in enumerate(parts):
        start = lead if number == 0 else indent
        inner = (*path, step)
        name = "- " if isinstance(step, int) else f"{_scalar(step)}:"
        if isinstance(part, (dict, list)) and part:
            if isinstance(step, int):
                yield from _lines(part, inner, loaded, start + name)
            else:
                yield start + name
                yield from _lines(part, inner, loaded, indent + "  ")
        else:
            shown = _scalar(loaded.masked.get(key_text(inner), part))
            gap = "" if isinstance(step, int) else " "
            yield f"{start}{name}{gap}{shown}  # {_origin(inner, loaded)}"


def _origin(path: KeyPath, loaded: LoadedConfig) -> str:
    """Where a value comes from; a list or mapping given as a whole has its parts' origin."""
    origin: Origin | None = loaded.origins.get(key_text(path))
    if origin is None and path == ("trainer", "type"):
        return "derived: the top-level type"
    return str(origin).replace("\n", " ") if origin is not None else "default"


def _scalar(value: Any) -> str:
    """A scalar, or an empty list or mapping, on one line that reads as the same value."""
    if value in ({}, []) and isinstance(value, (dict, list)):
        return "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _is_plain(text: str) -> bool:
    """Whether the text may stand without quotes: plain letters, and no number or keyword."""
    words = text.replace("/", "").replace("_", "").replace("-", "").replace(".", "")
    return (
        words.isascii()
        and words.isalnum()
        and text[0] not in "-."
        and resolve_scalar(text) == text
        and not text[0].isdigit()
    )


def _quoted(text: str) -> str:
    dumped = yaml.dump(text, default_style='"', allow_unicode=True, width=float("inf"))
    return dumped.rstrip("\n")


# --- comparison ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One key whose value differs between two resolved configs."""

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} → {self.now}"


def differing_keys(before: str, now: str) -> tuple[Difference, ...]:
    """The keys that matter to training and differ between two texts of `resolved_yaml`.

    Reads the texts alone, so that a config saved by another version, or with imports that are gone,
    can still be compared.
    """
    old, new = _training_values(before), _training_values(now)
    keys = [*new, *(key for key in old if key not in new)]
    return tuple(
        Difference(key, old.get(key, ABSENT), new.get(key, ABSENT))
        for key in keys
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    )


def _training_values(text: str) -> dict[str, str]:
    tree = plain(parse(text, lambda line, column: Origin("file", "", line, column), []))
    callbacks = tree.get("callbacks") or []
    tree["callbacks"] = [c for c in callbacks if c["type"] not in FREE_CALLBACKS]
    values = dict(_leaves(tree, ()))
    free = tuple(f"{key}{sign}" for key in FREE_TO_CHANGE for sign in ".[")
    return {
        key: value
        for key, value in values.items()
        if key not in FREE_TO_CHANGE and not key.startswith(free)
    }


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[str, str]]:
    if isinstance(value, (dict, list)) and value:
        for step, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, (*path, step))
    else:
        yield key_text(path), _scalar(value)


def plain_config(config: Section) -> Any:
    """The config as plain mappings, lists and scalars, every default included."""
    return plain(from_plain(_plain(config), Origin("default")))
