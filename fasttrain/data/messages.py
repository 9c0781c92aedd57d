"""From a row's list of messages, as people write them, to `Message`s; strict about everything."""

from __future__ import annotations

import json
from typing import Any

from fasttrain.data.conversation import Message

# What other formats call our four roles.
ROLE_NAMES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
_REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
_TRAIN_KEYS = ("train", "weight", "loss_weight")


class RowError(ValueError):
    """A row that cannot be learnt from: the reason rows are counted by, and where in the row."""

    def __init__(self, reason: str, field: str, detail: str = "") -> None:
        super().__init__(f"{field}: {reason} {detail}".rstrip())
        self.reason = reason
        self.field = field
        self.detail = detail


def kind_of(value: Any) -> str:
    """What a value is, as an error says it."""
    names = {dict: "an object", list: "a list", bool: "true or false", str: "text"}
    if value is None:
        return "null"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"the number {value}"
    return names.get(type(value), f"a {type(value).__name__}")


def looks_like_messages(value: Any) -> bool:
    """A list, not empty, of objects with a role and a content key (or tool calls)."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and any(key in part for key in ROLE_KEYS) for part in value)
    )


def read_messages(value: Any, field: str) -> list[Message]:
    """The messages of a row, in their order. `field` is the column, for error messages."""
    if isinstance(value, str):
        value = _from_text(value, field)
    if value is None:
        raise RowError("null messages", field)
    if not isinstance(value, list):
        raise RowError("wrong type", field, f"({kind_of(value)}; expected a list of messages)")
    if not value:
        raise RowError("empty conversation", field)
    return [read_message(part, f"{field}[{index}]") for index, part in enumerate(value)]


def _from_text(value: str, field: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        detail = f"({error.msg} at column {error.colno})"
        if value.lstrip().startswith("[{'"):
            detail = "(a Python list was printed here; write it with json.dumps)"
        raise RowError("invalid JSON", field, detail) from error


def read_message(value: Any, field: str) -> Message:
    """One message; both `role`/`content` and ShareGPT's `from`/`value` are read."""
    if not isinstance(value, dict):
        raise RowError("wrong type", field, f"({kind_of(value)}; expected an object with a role)")
    role, said = _role(value, field)
    if len(value) == 2 and type(value.get("content")) is str:
        return Message(role, value["content"])  # nearly all messages: a role, a text, nothing else
    calls = _tool_calls(value.get("tool_calls"), f"{field}.tool_calls")
    content = _content(value, field)
    if said == "function_call" and content is not None:
        calls, content = _tool_calls([_from_text(content, field)], field), None
    if content is None and calls is None:
        raise RowError("message without content", field, f"(role {role})")
    return Message(
        role=role,
        content=content,
        tool_calls=calls,
        name=_text(value, ("name",), field),
        tool_call_id=_text(value, ("tool_call_id",), field),
        reasoning=_text(value, _REASONING_KEYS, field),
        train=_train(value, field),
    )


def _first(value: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of `keys` that is set."""
    for key in keys:
        if value.get(key) is not None:
            return key
    return None


def _role(value: dict[str, Any], field: str) -> tuple[str, str]:
    """Our role, and the name it went by."""
    key = _first(value, ROLE_KEYS)
    if key is None:
        found = ", ".join(value) or "nothing"
        raise RowError("message without role", field, f"(fields: {found})")
    said = value[key]
    role = ROLE_NAMES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        shown = repr(said) if isinstance(said, str) else kind_of(said)
        raise RowError(
            "unknown role", f"{field}.{key}", f"({shown}; known: {', '.join(ROLE_NAMES)})"
        )
    return role, said.lower()


def _content(value: dict[str, Any], field: str) -> str | None:
    key = _first(value, CONTENT_KEYS)
    if key is None:
        return None
    content = value[key]
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, f"{field}.{key}[{i}]") for i, part in enumerate(content))
    raise RowError("wrong type", f"{field}.{key}", f"({kind_of(content)}; expected text)")


def _part(part: Any, field: str) -> str:
    """The text of one content part, `{"type": "text", "text": …}`."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        text = part.get("text", part.get("value"))
        if part.get("type", "text") == "text" and isinstance(text, str):
            return text
        if part.get("type", "text") != "text":
            detail = f"(a part of type {part['type']!r}; only text is learnt)"
            raise RowError("content is not text", field, detail)
    raise RowError("wrong type", field, f"({kind_of(part)}; expected a text part)")


def _tool_calls(value: Any, field: str) -> tuple[dict[str, Any], ...] | None:
    if isinstance(value, str) and value.strip():
        value = _from_text(value, field)
    if not value:  # absent, null or empty: no calls
        return None
    if not isinstance(value, list):
        raise RowError("wrong type", field, f"({kind_of(value)}; expected a list of calls)")
    return tuple(_tool_call(call, f"{field}[{index}]") for index, call in enumerate(value))


def _tool_call(value: Any, field: str) -> dict[str, Any]:
    """`{"type": "function", "function": {name, arguments}}`, from that or `{name, arguments}`."""
    if not isinstance(value, dict):
        raise RowError("wrong type", field, f"({kind_of(value)}; expected an object)")
    function = value.get("function") or value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("tool call without a name", field)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_text(arguments, f"{field}.arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        detail = f"({kind_of(arguments)}; expected an object)"
        raise RowError("wrong type", f"{field}.arguments", detail)
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": value["id"], **call} if isinstance(value.get("id"), str) else call


def _text(value: dict[str, Any], keys: tuple[str, ...], field: str) -> str | None:
    key = _first(value, keys)
    if key is None:
        return None
    if not isinstance(value[key], str):
        raise RowError("wrong type", f"{field}.{key}", f"({kind_of(value[key])}; expected text)")
    return str(value[key])


def _train(value: dict[str, Any], field: str) -> bool | None:
    """`train: true|false`, or a weight that is 0 or 1."""
    key = _first(value, _TRAIN_KEYS)
    if key is None:
        return None
    flag = value[key]
    if isinstance(flag, (bool, int, float)) and flag in (0, 1):
        return bool(flag)
    detail = f"({kind_of(flag) if not isinstance(flag, str) else repr(flag)}; expected 0 or 1)"
    raise RowError("unsupported weight", f"{field}.{key}", detail)
