"""The JSON Schema of a config, for editors: every registered type, with the help of every key."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from fasttrain.config import registry
from fasttrain.config.normalise import SHORT_SECTIONS
from fasttrain.config.numbers import HUMAN_NUMBER, HUMAN_POWER
from fasttrain.config.registry import Registry
from fasttrain.config.schema.root import TrainConfig
from fasttrain.config.sections import COMPONENT_LISTS, COMPONENTS

Schema = dict[str, Any]

_VARIABLE = r"\$\{env:[A-Za-z_][A-Za-z0-9_]*(:-.*)?\}"
_TEXTS: Schema = {
    "environment": {"type": "string", "pattern": f"^{_VARIABLE}$"},
    "human_number": {
        "type": "string",
        "pattern": f"^({HUMAN_NUMBER}|{HUMAN_POWER}|{_VARIABLE})$",
        "description": "A number as people write it: 8k, 1e6, 2^20, 4Ki, 50%.",
    },
}
# pydantic leaves the limits of a number that is read by a validator under its own names.
_LIMITS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
_OWN_CLASS = {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"}
_NEVER_LISTED = {("transform", "kernels")}  # always there
_TYPE_IS_IMPLIED = {("source", "file"), ("source", "huggingface")}  # by the key that names it


def config_schema() -> Schema:
    """Draft-07, which is what editors read."""
    definitions: Schema = {"own_class": _own_class(), **_TEXTS}
    root = _object(TrainConfig, definitions)
    properties = root["properties"]
    for key, kind in COMPONENTS.items():
        properties[key] = _section(key, kind, definitions)
    for (section, key), kind in COMPONENT_LISTS.items():
        if not section:
            properties[key] = _list(kind, definitions)
    properties["trainer"] = {"anyOf": _types(registry.TRAINERS, definitions)}
    properties["type"] = {**_type_name(registry.TRAINERS), "default": properties["type"]["default"]}
    _describe(TrainConfig, properties)
    extends = "A YAML file whose values stand below these; its path is relative to this file."
    properties["extends"] = {"type": "string", "description": extends}
    required = root.pop("required")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "fasttrain",
        **root,
        "anyOf": [{"required": required}, {"required": ["extends"]}],
        "$defs": dict(sorted(definitions.items())),
    }


# --- components ----------------------------------------------------------------------------------


def _section(key: str, kind: Registry, definitions: Schema) -> Schema:
    """One component: a mapping by its type, or the short form."""
    choices = _types(kind, definitions)
    option = SHORT_SECTIONS[key]
    if option == "type":
        choices.append(_type_name(kind))
    elif option == "sources":
        choices += [{"type": "string"}, _list(registry.SOURCES, definitions)]
    else:
        choices.append({"type": "string"})
    return {"anyOf": choices}


def _list(kind: Registry, definitions: Schema) -> Schema:
    """Entries are mappings or names; for sources any text, since it may be a path."""
    text = {"type": "string"} if kind is registry.SOURCES else _type_name(kind)
    return {"type": "array", "items": {"anyOf": [*_types(kind, definitions), text]}}


def _types(kind: Registry, definitions: Schema) -> list[Schema]:
    """References to the section of every type of a kind, made on first use."""
    names = [name for name in kind.names() if (kind.kind, name) not in _NEVER_LISTED]
    for name in names:
        key = f"{kind.kind}.{name}"
        if key not in definitions:
            definitions[key] = {}  # reserved: a section may hold lists of its own kind
            definitions[key] = _component(kind, name, definitions)
    references = [{"$ref": f"#/$defs/{kind.kind}.{name}"} for name in names]
    return [*references, {"$ref": "#/$defs/own_class"}]


def _component(kind: Registry, name: str, definitions: Schema) -> Schema:
    config = kind.config(name)
    schema = _object(config, definitions)
    properties = schema["properties"]
    for (section, key), inner in COMPONENT_LISTS.items():
        if section == kind.kind and key in properties:
            properties[key] = _list(inner, definitions)
    properties["type"] = {"const": name}
    _describe(config, properties)
    required = [key for key in schema.pop("required", []) if key != "type"]
    if (kind.kind, name) not in _TYPE_IS_IMPLIED:
        required.append("type")
    # A section may stand below one that `extends` brings; an entry of a list stands alone.
    in_list = kind in COMPONENT_LISTS.values()
    return schema | ({"required": required} if in_list else {})


def _type_name(kind: Registry) -> Schema:
    names = [name for name in kind.names() if (kind.kind, name) not in _NEVER_LISTED]
    return {"anyOf": [{"enum": names}, _OWN_CLASS]}


def _own_class() -> Schema:
    return {
        "type": "object",
        "description": "A class of your own, as `module:Class`.",
        "properties": {"type": _OWN_CLASS},
        "required": ["type"],
    }


# --- one class -----------------------------------------------------------------------------------


def _object(config: type[BaseModel], definitions: Schema) -> Schema:
    """A class's schema; the plain sections it holds become definitions."""
    schema = config.model_json_schema(ref_template="#/$defs/{model}")
    inner = schema.pop("$defs", {})
    components = {kind.section.__name__ for kind in registry.REGISTRIES.values()}
    for name, definition in inner.items():
        if name not in components:
            definitions[name] = _readable(definition)
    return _readable(schema)


def _readable(schema: Any) -> Any:
    """Without titles, and with what YAML may hold besides: human numbers and `${env:NAME}`."""
    if isinstance(schema, list):
        return [_readable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "prefixItems" in schema:
        first = schema["prefixItems"][0]
        schema = {key: value for key, value in schema.items() if key != "prefixItems"}
        schema["items"] = first
    result: Schema = {}
    for key, value in schema.items():
        if key == "description":
            result[key] = " ".join(value.split())
        elif key == "properties":
            result[key] = {name: _readable(part) for name, part in value.items()}
        elif key not in ("title", "default"):
            result[_LIMITS.get(key, key)] = _readable(value)
    if "default" in schema and schema["default"] not in ([], {}):
        result["default"] = schema["default"]
    return _with_text(result)


def _with_text(schema: Schema) -> Schema:
    """A leaf that is no text may also be written as text."""
    text: str | None = None
    if schema.get("type") in ("integer", "number"):
        text = "human_number"
    elif schema.get("type") == "boolean" or "enum" in schema:
        text = "environment"
    outer: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in outer}
    if text is not None:
        return {"anyOf": [inner, {"$ref": f"#/$defs/{text}"}], **outer}
    # Draft-07 reads nothing that stands beside a reference.
    return {"allOf": [inner], **outer} if "$ref" in inner and outer else schema


def _describe(config: type[BaseModel], properties: Schema) -> None:
    """Give every property the help text of its field."""
    for name, field in config.model_fields.items():
        if field.description:
            properties[name]["description"] = " ".join(field.description.split())
