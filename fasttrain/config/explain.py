"""pydantic's errors in the user's terms: what is wrong, what was found, what is expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from fasttrain.config.tree import Node

MAX_SHOWN = 60  # characters of a value in a message

_WHOLE = "a whole number such as 100 or 8k"
# pydantic's error type → (what is wrong, what is expected)
_MESSAGES: dict[str, tuple[str, str]] = {
    "int_type": ("not a whole number", _WHOLE),
    "int_parsing": ("not a whole number", _WHOLE),
    "int_from_float": ("not a whole number", _WHOLE),
    "float_type": ("not a number", "a number such as 2e-5"),
    "float_parsing": ("not a number", "a number such as 2e-5"),
    "finite_number": ("not a finite number", "a number such as 2e-5"),
    "bool_type": ("neither true nor false", "true or false"),
    "string_type": ("not text", "text; quote a number or a bool that is meant as text"),
    "model_type": ("not a mapping", "`key: value` lines"),
    "model_attributes_type": ("not a mapping", "`key: value` lines"),
    "dict_type": ("not a mapping", "`key: value` lines"),
    "tuple_type": ("not a list", "a list"),
    "too_short": ("empty", "at least {min_length}"),
    "too_long": ("too long", "at most {max_length}"),
    "greater_than": ("out of range", "more than {gt}"),
    "greater_than_equal": ("out of range", "at least {ge}"),
    "less_than": ("out of range", "less than {lt}"),
    "less_than_equal": ("out of range", "at most {le}"),
}


def describe(error: Mapping[str, Any], node: Node | None) -> str:
    """One sentence for an error that is neither an unknown nor a missing key."""
    got = shown(node) if node is not None else shown_value(error["input"])
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        expected = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"unknown value (got {got}, expected one of: {expected})."
    if error["type"] in _MESSAGES:
        what, expected = _MESSAGES[error["type"]]
        limits = {name: _number(limit) for name, limit in context.items()}
        return f"{what} (got {got}, expected {expected.format(**limits)})."
    return f"{str(error['msg']).removeprefix('Value error, ').rstrip('.')} (got {got})."


def _number(limit: Any) -> Any:
    """Limits of floats are floats: 0.0 reads better as 0."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def shown(node: Node) -> str:
    """A node's value for a message; secrets stay hidden."""
    if node.masked is not None:
        return node.masked
    if node.is_mapping:
        return "a mapping"
    return "a list" if node.is_list else shown_value(node.value)


def shown_value(value: Any) -> str:
    """A plain value for a message, cut short."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "an empty list" if not value else "a list"
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def suggestion(name: str, known: Iterable[str]) -> str:
    """`Did you mean …?`, or all there is to choose from."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"There are: {', '.join(names)}." if names else ""


def keys_at(section: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """The keys of the section that lies at `loc` in `section`."""
    for step in loc:
        if isinstance(step, int):
            continue
        field = section.model_fields.get(step)
        inner = _section_in(field.annotation) if field else None
        if inner is None:
            return []
        section = inner
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _section_in(part)
        if found is not None:
            return found
    return None
