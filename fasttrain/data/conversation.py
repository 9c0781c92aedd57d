"""The one internal form of a chat: messages in order, each with its role and content."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_to_json = json.JSONEncoder(ensure_ascii=False).encode
_OPTIONAL = ("tool_calls", "name", "tool_call_id", "reasoning", "train")


@dataclass(frozen=True)
class Message:
    """One turn.

    `content` is None only where an assistant turn carries `tool_calls`: a tuple of
    `{"type": "function", "function": {"name": str, "arguments": dict}}`, with an `id` where it had
    one. `reasoning` is what an assistant thought before it answered. `train` says whether the turn
    is supervised; None leaves it to the method.
    """

    role: str
    content: str | None
    tool_calls: tuple[dict[str, Any], ...] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    train: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """Role, content and whatever else is set."""
        values: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in _OPTIONAL:
            value = getattr(self, key)
            if value is not None:
                values[key] = list(value) if key == "tool_calls" else value
        return values


@dataclass(frozen=True)
class Conversation:
    """Messages in the order in which they were said."""

    messages: tuple[Message, ...]

    def to_json(self) -> str:
        """A JSON list of messages, without the fields that are not set."""
        return _to_json([message.as_dict() for message in self.messages])

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """The inverse of `to_json`."""
        messages = []
        for values in json.loads(text):
            calls = values.pop("tool_calls", None)
            messages.append(Message(**values, tool_calls=None if calls is None else tuple(calls)))
        return cls(tuple(messages))
